"""Readers of data sets, their conversion and their mixture."""
