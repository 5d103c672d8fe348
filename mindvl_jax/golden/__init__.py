"""Stored losses of a small training, to compare a machine with."""
