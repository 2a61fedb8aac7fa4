"""Engines that serve the corrected model to people: given the edits, and proven to hold them."""
