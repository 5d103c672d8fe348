"""Qwen3-MoE language model: the decoder alone."""

from mindvl_jax.models.layers.spec import LANGUAGE, ROUTED, language_spec
from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig
from mindvl_jax.models.qwen3_moe.presets import MODELS

SPEC = language_spec(
    "qwen3_moe",
    Qwen3MoEConfig,
    MODELS,
    hf="mindvl_jax.models.qwen3_moe.hf:MAPPING",
    adapters=True,
    parts={**LANGUAGE, **ROUTED},
)
