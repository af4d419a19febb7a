"""What a user looks at: tables, pictures, the self-check."""
