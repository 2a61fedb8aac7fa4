"""Carry the edits of another base over to the model that is loaded: what holds is kept, the rest computed anew."""
