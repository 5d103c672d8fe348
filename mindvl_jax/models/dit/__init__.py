"""Class-conditional diffusion transformer over the pixels of small images, trained by flow matching."""

from mindvl_jax.models.dit.config import DiTConfig
from mindvl_jax.models.dit.presets import MODELS
from mindvl_jax.models.spec import ModelSpec, Named

SPEC = ModelSpec(
    name="dit",
    config=DiTConfig,
    presets=MODELS,
    build=Named("mindvl_jax.models.dit.model:DiT"),
    processor=Named("mindvl_jax.models.dit.processor:DiTProcessor"),
    counts=None,
    objective="flow_matching",
    hf=None,
    parts={"condition": "condition/**", "blocks": "blocks/**", "head": "head*/**"},
    flops=Named("mindvl_jax.models.dit.flops:FlopCounter"),
)
