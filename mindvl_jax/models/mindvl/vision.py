"""Native-resolution vision tower of Qwen2.5-VL (technical report, section 2.1; reference: transformers' Qwen2.5-VL).

B rows, P patches, N heads, H head dim, D tower width, F feed-forward width, L layers. Patches of several images lie one
after another in a row, in window order; segment ids keep images apart and window ids keep windows apart.
"""

from __future__ import annotations

import math

import jax
from flax import nnx

from mindvl_jax.models.batch import Batch
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.layers.linear import GatedMLP, Linear, RMSNorm
from mindvl_jax.models.layers.rope import vision_tables
from mindvl_jax.models.layers.stack import rematerialise_attention, scan_alternating
from mindvl_jax.models.layers.vision import VisionAttention, embed_patches
from mindvl_jax.models.mindvl.config import VisionConfig

IMAGE_MEAN, IMAGE_STD = CLIP_MEAN, CLIP_STD


def window_patches(config: VisionConfig) -> int:
    """Most patches of one attention window.

    Windows hold whole merged groups: a window of 112 px holds 4 x 4 groups of 4.
    """
    return (config.window_size // config.pixels_per_token) ** 2 * config.merge_unit


class VisionBlock(nnx.Module):
    """Pre-norm attention and gated feed-forward, biases everywhere."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        L = config.depth
        self.norm1 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            bias=True,
            rngs=rngs,
            dtype=dtype,
            layers=L,
            residual_scale=1 / math.sqrt(2 * L),
        )

    def __call__(self, x_BPD, cos, sin, ids_BP, lengths_BM, longest: int | None, remat: str) -> jax.Array:
        def attend(block, x):
            return block.attention(block.norm1(x), cos, sin, ids_BP, lengths_BM, longest)

        with jax.named_scope("attention"):
            x_BPD = x_BPD + rematerialise_attention(attend, remat)(self, x_BPD)
        with jax.named_scope("mlp"):
            return x_BPD + self.mlp(self.norm2(x_BPD))


class VisionTower(nnx.Module):
    """Patch embedding and blocks; most attend inside windows, the listed ones over the whole image.

    The norm and the merging of four patches belong to the projector.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype, remat: str = "none"):
        self.config = config
        self.remat = remat
        self.patch_embed = Linear(
            config.patch_dim, config.hidden_size, ("patch", "embed"), bias=False, rngs=rngs, dtype=dtype
        )
        self.blocks = VisionBlock(config, rngs=rngs, dtype=dtype)

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
        """Features of every patch.

        Args:
          patches: (B, P, patch_dim) uint8 pixels or normalised floats, in window order.
          positions_BP2: (B, P, 2) height and width of each patch in its image.
          segment_ids_BP: (B, P) image of each patch, 0 is padding. window_ids_BP: (B, P) window of each patch, 0 is
            padding.
          image_lengths, window_lengths: (B, M) the same as counts, -1 padded; for kernels that want lengths.
          max_image_patches: static promise that no image is larger; lets full attention compute a band.
          dtype: of the computation.

        Returns:
          (B, P, D); rows of padding patches mean nothing.
        """
        config = self.config
        with jax.named_scope("patch_embed"):
            x_BPD = embed_patches(self.patch_embed, patches, config, dtype, self.remat)
        cos, sin = vision_tables(positions_BP2, config.hidden_size // config.num_heads, config.rope_theta)

        def run(ids, lengths, longest):
            return lambda x, block: block(x, cos, sin, ids, lengths, longest, self.remat)

        inside_window = run(window_ids_BP, window_lengths, window_patches(config))
        whole_image = run(segment_ids_BP, image_lengths, max_image_patches)
        with jax.named_scope("blocks"):
            return scan_alternating(
                inside_window,
                whole_image,
                x_BPD,
                self.blocks,
                config.depth,
                config.fullatt_block_indexes,
                remat=self.remat,
            )

    def run_block(self, number: int, x_BPD: jax.Array, batch: Batch) -> jax.Array:
        """One block on any input, for comparisons part by part."""
        config = self.config
        full = number in config.fullatt_block_indexes
        ids = batch.patch_segment_ids if full else batch.patch_window_ids
        tables = vision_tables(batch.patch_positions, config.hidden_size // config.num_heads, config.rope_theta)
        block = jax.tree.map(lambda leaf: leaf[number], self.blocks)
        return block(x_BPD, *tables, ids, None, None if full else window_patches(config), "none")
