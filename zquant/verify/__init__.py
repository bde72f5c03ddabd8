"""A model checked: its files against what they say of themselves, and against their source."""
