"""Published sizes of Janus-Pro, without the parts that draw. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.janus.config import JanusConfig, VisionConfig
from mindvl_jax.models.layers.config import TextConfig

BORDERS = dict(vision_start_token_id=100016, vision_end_token_id=100593)
"""Ids of `<begin_of_image>` and `<end_of_image>`, which no published config.json gives."""


def _model(layers: int, width: int, heads: int, feed_forward: int) -> JanusConfig:
    text = TextConfig(
        family="llama",
        vocab_size=102400,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope="1d",
        max_position_embeddings=16384,
    )
    vision = VisionConfig(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16)
    return JanusConfig(vision=vision, text=text, image_token_id=100581, **BORDERS)


MODELS: dict[str, Callable[[], JanusConfig]] = {
    "janus-pro-1b": functools.partial(_model, 24, 2048, 16, 5632),
    "janus-pro-7b": functools.partial(_model, 30, 4096, 32, 11008),
}
