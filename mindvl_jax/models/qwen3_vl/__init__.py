"""Qwen3-VL: full-attention tower with resized learned positions, DeepStack, Qwen3 decoder with interleaved M-RoPE;
frame pairs of a video stand behind their times.
"""

from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig
from mindvl_jax.models.qwen3_vl.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "qwen3_vl",
    Qwen3VLConfig,
    MODELS,
    build="mindvl_jax.models.qwen3_vl.model:Qwen3VL",
    hf="mindvl_jax.models.qwen3_vl.hf:MAPPING",
    adapters=True,
)
