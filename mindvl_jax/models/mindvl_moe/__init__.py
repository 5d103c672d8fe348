"""MindVL on DeepSeek-V3: the native-resolution tower and projector of MindVL with a routed decoder."""

from mindvl_jax.models.mindvl_moe.config import MindVLMoEConfig
from mindvl_jax.models.mindvl_moe.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="mindvl_moe",
    config=MindVLMoEConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.mindvl.model:MindVL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=None,
    parts={
        "vision": "vision/**", "projector": "projector/**", "language": "language/**",
        "experts": "language/layers/moe/experts/**", "router": "language/layers/moe/router/**",
    },
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
)  # fmt: skip
