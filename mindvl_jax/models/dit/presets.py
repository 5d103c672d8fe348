"""Sizes by name. The published DiTs work on latents of an image autoencoder, which this family does not have yet."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.dit.config import DiTConfig


def _digits() -> DiTConfig:
    """Handwritten digits of 20 x 20 pixels: trains on two processor cores in minutes."""
    return DiTConfig(
        image_size=20,
        patch_size=4,
        channels=1,
        classes=tuple("0123456789"),
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
    )


MODELS: dict[str, Callable[[], DiTConfig]] = {"dit-digits": _digits}
