"""What happens at an optimizer step: gates move, and at each interval's end ranks."""
