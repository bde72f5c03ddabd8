"""Storage types: numbers only, no files."""
