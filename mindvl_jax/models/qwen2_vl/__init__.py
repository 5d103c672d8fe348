"""Qwen2-VL: full-attention vision tower, LayerNorm merger, Qwen2 decoder; frames counted by their number, not by
seconds.
"""

from mindvl_jax.models.qwen2_vl.config import Qwen2VLConfig
from mindvl_jax.models.qwen2_vl.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "qwen2_vl",
    Qwen2VLConfig,
    MODELS,
    build="mindvl_jax.models.qwen2_vl.model:Qwen2VL",
    hf="mindvl_jax.models.qwen2_vl.hf:MAPPING",
    adapters=True,
)
