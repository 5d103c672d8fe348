"""Shared by vision-language families: packed conversations with images and videos, from samples to
batches.

A family qualifies with a configuration of `vision` (a `PatchGeometry`), `text` and the ids of its visual tokens.
Imports no jax.
"""
