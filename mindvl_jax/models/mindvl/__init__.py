"""MindVL and Qwen2.5-VL: windowed vision tower, two-layer projector, Qwen2.5 or Qwen3 decoder."""

from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "mindvl",
    MindVLConfig,
    MODELS,
    build="mindvl_jax.models.mindvl.model:MindVL",
    hf="mindvl_jax.models.mindvl.hf:MAPPING",
    adapters=True,
)
