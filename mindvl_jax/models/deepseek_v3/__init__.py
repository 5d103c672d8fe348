"""DeepSeek-V3 language model: the decoder alone."""

from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.deepseek_v3.presets import MODELS
from mindvl_jax.models.layers.spec import LANGUAGE, ROUTED, language_spec

SPEC = language_spec(
    "deepseek_v3",
    DeepSeekV3Config,
    MODELS,
    hf="mindvl_jax.models.deepseek_v3.hf:MAPPING",
    adapters=True,
    parts={**LANGUAGE, **ROUTED},
)
