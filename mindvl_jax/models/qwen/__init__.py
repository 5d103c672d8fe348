"""Qwen2.5 and Qwen3 language models: the decoder alone."""

from mindvl_jax.models.layers.spec import language_spec
from mindvl_jax.models.qwen.config import QwenConfig
from mindvl_jax.models.qwen.presets import MODELS

SPEC = language_spec(
    "qwen",
    QwenConfig,
    MODELS,
    hf="mindvl_jax.models.qwen.hf:MAPPING",
    adapters=True,
)
