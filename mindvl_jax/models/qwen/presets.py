"""Published sizes of Qwen3 by name. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.qwen.config import QwenConfig


def _text(layers: int, width: int, heads: int, feed_forward: int, tied: bool) -> TextConfig:
    return TextConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope="1d",
        max_position_embeddings=40960,
    )


QWEN3: dict[str, Callable[[], TextConfig]] = {
    "qwen3-0.6b": lambda: _text(28, 1024, 16, 3072, True),
    "qwen3-1.7b": lambda: _text(28, 2048, 16, 6144, True),
    "qwen3-4b": lambda: _text(36, 2560, 32, 9728, True),
    "qwen3-8b": lambda: _text(36, 4096, 32, 12288, False),
    "qwen3-32b": lambda: _text(64, 5120, 64, 25600, False),
}
"""Decoders alone, which other families build on."""


def _model(name: str) -> QwenConfig:
    return QwenConfig(text=QWEN3[name]())


MODELS: dict[str, Callable[[], QwenConfig]] = {name: functools.partial(_model, name) for name in QWEN3}
