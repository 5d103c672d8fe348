"""MindVL: vision tower, projector and language model as one differentiable function of a packed batch.

B rows, T tokens, P patches, D language width, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.linear import RMSNorm
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.vision import VisionTower
from mindvl_jax.models.vision_language.model import VisionLanguageModel


class MindVL(VisionLanguageModel):
    """The assembled model.

    Parameters live under `vision/`, `projector/` and `language/`; layers are stacked on a leading axis. Created under a
    mesh and logical axis rules (see `models.parameters.parameter`) they are placed at once; `nnx.eval_shape` builds it
    without memory.
    """

    def __init__(self, config: MindVLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype = jnp.dtype(config.param_dtype)
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype, remat=config.remat)
        norm = RMSNorm(config.vision.hidden_size, eps=config.vision.rms_norm_eps, dtype=dtype)
        self.projector = Projector(
            config.vision.hidden_size,
            config.vision.merge_unit,
            config.text.hidden_size,
            norm=norm,
            rngs=rngs,
            dtype=dtype,
        )
