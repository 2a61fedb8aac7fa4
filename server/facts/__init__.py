"""Asking about facts, correcting them, and checking corrections."""
