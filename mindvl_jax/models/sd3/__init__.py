"""Stable Diffusion 3 and 3.5: a rectified-flow transformer over latents, conditioned on text.

Not a registered family yet: `train.py` does not know it.
"""
