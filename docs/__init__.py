"""Documentation, and what writes it from the code."""
