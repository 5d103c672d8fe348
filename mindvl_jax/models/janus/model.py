"""Janus-Pro's understanding half (reference: transformers' Janus)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.janus.config import JanusConfig
from mindvl_jax.models.layers.config import HALF
from mindvl_jax.models.layers.linear import LayerNorm
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.vision import SquareTower, VisionBlock
from mindvl_jax.models.vision_language.model import VisionLanguageModel
from npu_bridge import ops


class SiglipTower(SquareTower):
    """With the norm after the last block."""

    def __init__(self, config, *, rngs: nnx.Rngs, dtype, remat: str):
        gelu = functools.partial(ops.gelu, approximate=False)
        super().__init__(
            config,
            VisionBlock(config, gelu, rngs=rngs, dtype=dtype, bias=config.attention_bias),
            used=config.depth,
            patch_bias=True,
            before=None,
            class_token=False,
            statistics=(HALF, HALF),
            rngs=rngs,
            dtype=dtype,
            remat=remat,
        )
        self.after = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, *args, **options) -> jax.Array:
        """As `SquareTower`, normalised."""
        return self.after(super().__call__(*args, **options))


class Janus(VisionLanguageModel):
    """The assembled model."""

    def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, vision, width = jnp.dtype(config.param_dtype), config.vision, config.text.hidden_size
        self.vision = SiglipTower(vision, rngs=rngs, dtype=dtype, remat=config.remat)
        self.projector = Projector(
            vision.hidden_size, vision.merge_unit, width, norm=None, hidden=width, rngs=rngs, dtype=dtype
        )
