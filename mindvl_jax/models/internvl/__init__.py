"""InternVL 2.5, 3 and 3.5: InternViT over dynamic tiles with a thumbnail, Qwen2.5 or Qwen3 decoder, 1-D positions."""

from mindvl_jax.models.internvl.config import InternVLConfig
from mindvl_jax.models.internvl.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "internvl",
    InternVLConfig,
    MODELS,
    build="mindvl_jax.models.internvl.model:InternVL",
    hf="mindvl_jax.models.internvl.hf:MAPPING",
    adapters=True,
)
