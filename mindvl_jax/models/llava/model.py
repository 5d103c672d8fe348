"""LLaVA-1.5 (reference: transformers' Llava over CLIP and Llama)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.layers.linear import LayerNorm, quick_gelu
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.vision import SquareTower, VisionBlock
from mindvl_jax.models.llava.config import LlavaConfig
from mindvl_jax.models.vision_language.model import VisionLanguageModel


class ClipTower(SquareTower):
    """With the norm after the last block, which the published files hold and no visual token depends on."""

    def __init__(self, config, *, rngs: nnx.Rngs, dtype, remat: str):
        norm = dict(eps=config.layer_norm_eps, dtype=dtype)
        super().__init__(
            config,
            VisionBlock(config, quick_gelu, rngs=rngs, dtype=dtype),
            used=config.full_blocks,
            patch_bias=False,
            before=LayerNorm(config.hidden_size, **norm),
            statistics=(CLIP_MEAN, CLIP_STD),
            rngs=rngs,
            dtype=dtype,
            remat=remat,
        )
        self.after = LayerNorm(config.hidden_size, **norm)


class Llava(VisionLanguageModel):
    """The assembled model."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, vision, width = jnp.dtype(config.param_dtype), config.vision, config.text.hidden_size
        self.vision = ClipTower(vision, rngs=rngs, dtype=dtype, remat=config.remat)
        self.projector = Projector(
            vision.hidden_size, vision.merge_unit, width, norm=None, hidden=width, rngs=rngs, dtype=dtype
        )
