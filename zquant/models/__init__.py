"""The three networks of Z-Image, one file each, and how files become them."""
