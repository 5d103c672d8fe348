"""Qwen3-VL with a routed decoder: tower, mergers and DeepStack of the dense sizes."""

from mindvl_jax.models.qwen3_vl_moe.config import Qwen3VLMoEConfig
from mindvl_jax.models.qwen3_vl_moe.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="qwen3_vl_moe",
    config=Qwen3VLMoEConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.qwen3_vl.model:Qwen3VL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.qwen3_vl_moe.hf:MAPPING"),
    parts={
        "vision": "vision/**",
        "projector": "projector/**",
        "language": "language/**",
        "experts": "language/layers/moe/experts/**",
        "router": "language/layers/moe/router/**",
    },
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
)
