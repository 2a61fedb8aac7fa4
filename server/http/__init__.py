"""HTTP: who may connect."""
