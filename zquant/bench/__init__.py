"""What speed and memory this machine gives, against what it could; and what a picture costs."""
