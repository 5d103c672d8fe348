"""Qwen2-VL (arXiv 2409.12191; reference: transformers' Qwen2-VL).

B rows, P patches, D tower width, L layers. Segment ids keep images and frame pairs apart; window ids are not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.linear import LayerNorm, Linear, quick_gelu
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.stack import scan_layers
from mindvl_jax.models.layers.vision import VisionBlock, WholeImageTower, embed_patches
from mindvl_jax.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig
from mindvl_jax.models.vision_language.model import VisionLanguageModel


class VisionTower(WholeImageTower):
    """Patch embedding and blocks. The norm and the merging of four patches belong to the projector."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype, remat: str = "none"):
        self.config = config
        self.remat = remat
        self.patch_embed = Linear(
            config.patch_dim, config.hidden_size, ("patch", "embed"), bias=False, rngs=rngs, dtype=dtype
        )
        self.blocks = VisionBlock(config, quick_gelu, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        patches,
        positions_BP2,
        segment_ids_BP,
        window_ids_BP,
        *,
        image_lengths=None,
        window_lengths=None,
        max_image_patches: int | None = None,
        dtype,
    ) -> jax.Array:
        """Features (B, P, D) of every patch; outputs at padding patches are never used.

        Args:
          patches: (B, P, patch_dim) uint8 pixels or normalised floats, the patches of one visual token next to each
            other.
          positions_BP2: (B, P, 2) height and width of each patch in its image.
          segment_ids_BP: (B, P) image or frame pair of each patch, 0 is padding. image_lengths: (B, M) the same as
            counts.
          window_ids_BP, window_lengths: not read.
          max_image_patches: static promise that no image is larger; lets attention compute a band.
        """
        with jax.named_scope("patch_embed"):
            x_BPD = embed_patches(self.patch_embed, patches, self.config, dtype, self.remat)
        tables = self.tables(positions_BP2)

        def block_step(x, block):
            return block(x, *tables, segment_ids_BP, image_lengths, max_image_patches, self.remat)

        with jax.named_scope("blocks"):
            return scan_layers(block_step, x_BPD, self.blocks, remat=self.remat)


class Qwen2VL(VisionLanguageModel):
    """The assembled model."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, vision = jnp.dtype(config.param_dtype), config.vision
        self.vision = VisionTower(vision, rngs=rngs, dtype=dtype, remat=config.remat)
        norm = LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps, dtype=dtype)
        self.projector = Projector(
            vision.hidden_size, vision.merge_unit, config.text.hidden_size, norm=norm, rngs=rngs, dtype=dtype
        )
