"""DeepSeek-V3 language model: the decoder alone."""

from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.deepseek_v3.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="deepseek_v3",
    config=DeepSeekV3Config,
    presets=MODELS,
    build=Named("mindvl_jax.models.layers.language_model:LanguageModel"),
    processor=None,
    counts=None,
    objective="sft",
    hf=Named("mindvl_jax.models.deepseek_v3.hf:MAPPING"),
    parts={
        "language": "language/**",
        "experts": "language/layers/moe/experts/**",
        "router": "language/layers/moe/router/**",
    },
    flops=None,
)
