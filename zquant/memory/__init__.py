"""What a machine has, and what fits into it."""
