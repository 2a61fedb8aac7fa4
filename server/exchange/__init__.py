"""Exporting and importing edits."""
