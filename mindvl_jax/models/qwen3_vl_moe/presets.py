"""Published sizes of Qwen3-VL with a routed decoder. Imports no jax."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindvl_jax.models.layers.config import MoEConfig, Qwen3MoETextConfig
from mindvl_jax.models.layers.qwen_vl_hf import TOKENS
from mindvl_jax.models.qwen3_vl.presets import TEXT, large_tower
from mindvl_jax.models.qwen3_vl_moe.config import Qwen3VLMoEConfig


def _model(layers: int, width: int, heads: int, expert_width: int) -> Qwen3VLMoEConfig:
    moe = MoEConfig(
        experts=128,
        experts_per_token=8,
        intermediate_size=expert_width,
        scoring="softmax",
        renormalize=True,
        balance_loss=1e-3,
    )
    text = Qwen3MoETextConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        tie_word_embeddings=False,
        moe=moe,
        **TEXT,
    )
    return Qwen3VLMoEConfig(vision=large_tower(), text=text, **TOKENS)


MODELS: dict[str, Callable[[], Qwen3VLMoEConfig]] = {
    "qwen3-vl-30b-a3b": functools.partial(_model, 48, 2048, 32, 768),
    "qwen3-vl-235b-a22b": functools.partial(_model, 94, 4096, 64, 1536),
}
