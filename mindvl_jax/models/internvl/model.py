"""InternVL (reference: transformers' InternVL).

Patches of a visual token lie together, so that the published pixel shuffle is a reshape.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.internvl.config import InternVLConfig
from mindvl_jax.models.layers.config import IMAGENET_MEAN, IMAGENET_STD
from mindvl_jax.models.layers.linear import LayerNorm, RMSNorm
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.vision import SquareTower, VisionBlock
from mindvl_jax.models.vision_language.model import VisionLanguageModel
from npu_bridge import ops

_PROJECTOR_EPS = 1e-5  # not in the published file


class InternVL(VisionLanguageModel):
    """The assembled model."""

    def __init__(self, config: InternVLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, vision = jnp.dtype(config.param_dtype), config.vision
        blocks = VisionBlock(
            vision,
            functools.partial(ops.gelu, approximate=False),
            rngs=rngs,
            dtype=dtype,
            norm=LayerNorm if vision.norm == "layer" else RMSNorm,
            layer_scale=True,
            bias=vision.attention_bias,
            qk_norm=vision.qk_norm,
        )
        self.vision = SquareTower(
            vision,
            blocks,
            used=vision.depth,
            patch_bias=True,
            before=None,
            statistics=(IMAGENET_MEAN, IMAGENET_STD),
            rngs=rngs,
            dtype=dtype,
            remat=config.remat,
        )
        width = config.text.hidden_size
        norm = LayerNorm(vision.hidden_size * vision.merge_unit, eps=_PROJECTOR_EPS, dtype=dtype, name="merged")
        self.projector = Projector(
            vision.hidden_size,
            vision.merge_unit,
            width,
            norm=norm,
            norm_merged=True,
            hidden=width,
            rngs=rngs,
            dtype=dtype,
        )
