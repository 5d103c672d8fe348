"""Qwen3-VL with a routed decoder: tower, mergers and DeepStack of the dense sizes."""

from mindvl_jax.models.layers.spec import ROUTED
from mindvl_jax.models.qwen3_vl_moe.config import Qwen3VLMoEConfig
from mindvl_jax.models.qwen3_vl_moe.presets import MODELS
from mindvl_jax.models.vision_language.spec import PARTS, vision_language_spec

SPEC = vision_language_spec(
    "qwen3_vl_moe",
    Qwen3VLMoEConfig,
    MODELS,
    build="mindvl_jax.models.qwen3_vl.model:Qwen3VL",
    hf="mindvl_jax.models.qwen3_vl_moe.hf:MAPPING",
    adapters=True,
    parts={**PARTS, **ROUTED},
)
