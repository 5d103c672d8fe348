"""InternVL 2.5, 3 and 3.5: InternViT over dynamic tiles with a thumbnail, Qwen2.5 or Qwen3 decoder, 1-D positions."""

from mindvl_jax.models.internvl.config import InternVLConfig
from mindvl_jax.models.internvl.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="internvl",
    config=InternVLConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.internvl.model:InternVL"),
    processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
    counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
    objective="sft",
    hf=Named("mindvl_jax.models.internvl.hf:MAPPING"),
    parts={"vision": "vision/**", "projector": "projector/**", "language": "language/**"},
    flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
    adapters=True,
)
