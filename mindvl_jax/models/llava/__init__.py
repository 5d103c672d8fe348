"""LLaVA-1.5: CLIP tower of one square, two-layer projector, Llama decoder with one running index."""

from mindvl_jax.models.llava.config import LlavaConfig
from mindvl_jax.models.llava.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "llava",
    LlavaConfig,
    MODELS,
    build="mindvl_jax.models.llava.model:Llava",
    hf="mindvl_jax.models.llava.hf:MAPPING",
    adapters=True,
)
