"""Demonstrations built on the product."""
