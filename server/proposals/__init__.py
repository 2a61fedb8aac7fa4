"""Proposals: corrections that were computed and measured, and wait for somebody to decide."""
