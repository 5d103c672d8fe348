"""Qwen2.5 and Qwen3 language models: the decoder alone."""

from mindvl_jax.models.qwen.config import QwenConfig
from mindvl_jax.models.qwen.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="qwen",
    config=QwenConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.layers.language_model:LanguageModel"),
    processor=None,
    counts=None,
    objective="sft",
    hf=Named("mindvl_jax.models.qwen.hf:MAPPING"),
    parts={"language": "language/**"},
    flops=None,
    adapters=True,
)
