"""Steering vectors: create, dose, calibrate, evaluate."""
