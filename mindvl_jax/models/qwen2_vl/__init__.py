"""Qwen2-VL: full-attention vision tower, LayerNorm merger, Qwen2 decoder; frames counted by their number, not by
seconds.
"""

from mindvl_jax.models.qwen2_vl.config import Qwen2VLConfig
from mindvl_jax.models.qwen2_vl.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="qwen2_vl",
    config=Qwen2VLConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.qwen2_vl.model:Qwen2VL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.qwen2_vl.hf:MAPPING"),
    parts={"vision": "vision/**", "projector": "projector/**", "language": "language/**"},
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
)
