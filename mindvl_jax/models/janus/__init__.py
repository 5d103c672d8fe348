"""Janus-Pro's understanding of images: SigLIP tower of one square, two-layer projector, Llama decoder. Drawing is not
built.
"""

from mindvl_jax.models.janus.config import JanusConfig
from mindvl_jax.models.janus.presets import MODELS
from mindvl_jax.models.vision_language.spec import vision_language_spec

SPEC = vision_language_spec(
    "janus",
    JanusConfig,
    MODELS,
    build="mindvl_jax.models.janus.model:Janus",
    hf="mindvl_jax.models.janus.hf:MAPPING",
    adapters=True,
)
