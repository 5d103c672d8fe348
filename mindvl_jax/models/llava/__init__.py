"""LLaVA-1.5: CLIP tower of one square, two-layer projector, Llama decoder with one running index."""

from mindvl_jax.models.llava.config import LlavaConfig
from mindvl_jax.models.llava.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="llava",
    config=LlavaConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.llava.model:Llava"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.llava.hf:MAPPING"),
    parts={"vision": "vision/**", "projector": "projector/**", "language": "language/**"},
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
    adapters=True,
)
