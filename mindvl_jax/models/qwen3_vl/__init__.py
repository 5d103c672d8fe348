"""Qwen3-VL: full-attention tower with resized learned positions, DeepStack, Qwen3 decoder with interleaved M-RoPE;
frame pairs of a video stand behind their times.
"""

from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig
from mindvl_jax.models.qwen3_vl.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="qwen3_vl",
    config=Qwen3VLConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.qwen3_vl.model:Qwen3VL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.qwen3_vl.hf:MAPPING"),
    parts={"vision": "vision/**", "projector": "projector/**", "language": "language/**"},
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
    adapters=True,
)
