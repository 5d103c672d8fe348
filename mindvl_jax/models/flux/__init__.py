"""Flux.1: a rectified-flow transformer over latents of an image autoencoder, conditioned on text.

Not a registered family yet: `mindvl imagine` reads it, `train.py` does not know it.
"""
