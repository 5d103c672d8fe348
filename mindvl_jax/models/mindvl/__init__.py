"""MindVL and Qwen2.5-VL: windowed vision tower, two-layer projector, Qwen2.5 or Qwen3 decoder."""

from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="mindvl",
    config=MindVLConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.mindvl.model:MindVL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.mindvl.hf:MAPPING"),
    parts={"vision": "vision/**", "projector": "projector/**", "language": "language/**"},
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
    adapters=True,
)
