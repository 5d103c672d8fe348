"""Published sizes of LLaVA-1.5. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.llava.config import LlavaConfig, VisionConfig


def _model(layers: int, width: int, heads: int, feed_forward: int) -> LlavaConfig:
    """Vicuna's 32,000 words, the image token, a padding token, rows up to a multiple of 64."""
    text = TextConfig(
        family="llama",
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope="1d",
        max_position_embeddings=4096,
    )
    vision = VisionConfig(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16)
    return LlavaConfig(vision=vision, text=text, image_token_id=32000)


MODELS: dict[str, Callable[[], LlavaConfig]] = {
    "llava-1.5-7b": functools.partial(_model, 32, 4096, 32, 11008),
    "llava-1.5-13b": functools.partial(_model, 40, 5120, 40, 13824),
}
