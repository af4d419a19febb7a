"""What a user does to a model: patch, merge, load."""
