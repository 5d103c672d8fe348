"""The published sizes, under the room that builds them; they are kept free of jax in `mindvl_jax.presets`."""

from mindvl_jax.presets import MODELS, TEXT, VISION, get

__all__ = ["MODELS", "TEXT", "VISION", "get"]
