"""Qwen3-MoE language model: the decoder alone."""

from mindvl_jax.models.qwen3_moe.config import Qwen3MoEConfig
from mindvl_jax.models.qwen3_moe.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="qwen3_moe",
    config=Qwen3MoEConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.layers.language_model:LanguageModel"),
    processor=None,
    counts=None,
    objective="sft",
    hf=Named("mindvl_jax.models.qwen3_moe.hf:MAPPING"),
    parts={
        "language": "language/**",
        "experts": "language/layers/moe/experts/**",
        "router": "language/layers/moe/router/**",
    },
    flops=None,
)
