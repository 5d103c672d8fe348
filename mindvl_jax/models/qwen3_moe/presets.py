"""Published sizes of Qwen3-MoE. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.layers.config import MoEConfig, Qwen3MoETextConfig
from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig


def _model(layers: int, width: int, heads: int, expert_width: int) -> Qwen3MoEConfig:
    moe = MoEConfig(
        experts=128,
        experts_per_token=8,
        intermediate_size=expert_width,
        scoring="softmax",
        renormalize=True,
        balance_loss=1e-3,
    )
    text = Qwen3MoETextConfig(
        vocab_size=151936,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=False,
        rope="1d",
        max_position_embeddings=40960,
        moe=moe,
    )
    return Qwen3MoEConfig(text=text)


MODELS: dict[str, Callable[[], Qwen3MoEConfig]] = {
    "qwen3-30b-a3b": functools.partial(_model, 48, 2048, 32, 768),
    "qwen3-235b-a22b": functools.partial(_model, 94, 4096, 64, 1536),
}
