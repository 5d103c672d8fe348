"""MindVL on DeepSeek-V3: the native-resolution tower and projector of MindVL with a routed decoder."""

from mindvl_jax.models.layers.spec import ROUTED
from mindvl_jax.models.mindvl_moe.config import MindVLMoEConfig
from mindvl_jax.models.mindvl_moe.presets import MODELS
from mindvl_jax.models.vision_language.spec import PARTS, vision_language_spec

SPEC = vision_language_spec(
    "mindvl_moe",
    MindVLMoEConfig,
    MODELS,
    build="mindvl_jax.models.mindvl.model:MindVL",
    hf=None,
    parts={**PARTS, **ROUTED},
)
