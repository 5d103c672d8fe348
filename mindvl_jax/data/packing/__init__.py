"""Samples to packed rows of fixed size."""
