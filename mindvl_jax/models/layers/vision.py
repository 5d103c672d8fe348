"""Shared by vision towers: pixels to normalised patches, attention with two-dimensional rotary positions.

B rows, P patches, N heads, H head dim, D tower width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.layers.linear import MLP, LayerNorm, Linear, RMSNorm, parameter
from mindvl_jax.models.layers.rope import vision_tables
from mindvl_jax.models.layers.stack import in_pieces, keep, rematerialise_attention, scan_layers
from mindvl_jax.parallel.attention import attention
from npu_bridge import ops


def normalize_patches(
    patches: jax.Array,
    config: PatchGeometry,
    dtype,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> jax.Array:
    """uint8 pixels to normalised values in `dtype`; float patches are taken as normalised.

    Args:
      patches: (B, P, patch_dim), entries in (channel, frame, row, column) order.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches.astype(dtype)
    if patches.dtype != jnp.uint8:
        raise TypeError(f"patches have dtype {patches.dtype}; expected uint8 pixels or normalised floats")
    repeat = config.patch_dim // config.in_channels
    shift, spread = (np.repeat(np.asarray(values, np.float64) * 255, repeat) for values in (mean, std))
    return ((patches.astype(jnp.float32) - shift.astype(np.float32)) * (1 / spread).astype(np.float32)).astype(dtype)


def embed_patches(embedding: Linear, patches: jax.Array, config: PatchGeometry, dtype, remat: str, *statistics):
    """Return (B, P, D) embedded patches; `statistics` are those of `normalize_patches`.

    A convolution whose kernel equals its stride is a matrix product over the flattened patch. Its gradient wants its
    input: bytes as they came, or four times as much in float32 for the whole step.
    """

    def embed(patches):
        return embedding(normalize_patches(patches, config, dtype, *statistics))

    return in_pieces(embed, patches) if remat == "full" else embed(patches)


class VisionAttention(nnx.Module):
    """Bidirectional attention inside equal ids, with two-dimensional rotary positions or (tables None) without.

    Args:
      config: has `hidden_size`, `num_heads` and `depth`, with `qk_norm` also `layer_norm_eps`.
      bias: of queries, keys and values. qk_norm: RMSNorm of queries and keys over the whole width, before the heads.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtype, bias: bool = True, qk_norm: bool = False):
        D = config.hidden_size
        if D % config.num_heads or D // config.num_heads % 4:
            raise ValueError(
                f"vision.hidden_size {D} over {config.num_heads} heads must give a head dim that is a multiple of 4"
            )
        self.num_heads = config.num_heads
        common = dict(rngs=rngs, dtype=dtype, layers=config.depth)
        self.query = Linear(D, D, ("embed", "heads"), bias=bias, **common)
        self.key = Linear(D, D, ("embed", "heads"), bias=bias, **common)
        self.value = Linear(D, D, ("embed", "heads"), bias=bias, **common)
        self.output = Linear(D, D, ("heads", "embed"), bias=True, scale=1 / math.sqrt(2 * config.depth), **common)

        def norm():
            width = dict(name="heads", layers=config.depth)
            return RMSNorm(D, eps=config.layer_norm_eps, dtype=dtype, **width) if qk_norm else None

        self.query_norm, self.key_norm = norm(), norm()

    def __call__(self, x_BPD, cos_BPH, sin_BPH, ids_BP, lengths_BM, longest: int | None) -> jax.Array:
        B, P, _ = x_BPD.shape

        def heads(layer, norm=None):
            out = keep(layer(x_BPD))
            return (out if norm is None else norm(out)).reshape(B, P, self.num_heads, -1)

        q_BPNH, k_BPNH = heads(self.query, self.query_norm), heads(self.key, self.key_norm)
        if cos_BPH is not None:
            q_BPNH, k_BPNH = ops.rotary(q_BPNH, cos_BPH, sin_BPH), ops.rotary(k_BPNH, cos_BPH, sin_BPH)
        out_BPNH = attention(
            q_BPNH,
            k_BPNH,
            heads(self.value),
            segment_ids=ids_BP,
            causal=False,
            max_segment_length=longest,
            lengths=lengths_BM,
            padding="unread",
        )
        return self.output(keep(out_BPNH.reshape(B, P, -1)))


class VisionBlock(nnx.Module):
    """Pre-norm attention and ungated feed-forward.

    Args:
      config: has `hidden_size`, `intermediate_size`, `num_heads`, `depth` and `layer_norm_eps`.
      norm: LayerNorm or RMSNorm. layer_scale: learned factors, one a channel, on what both halves add.
      attention: options of `VisionAttention`.
    """

    def __init__(
        self,
        config: Any,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        dtype,
        norm: type[LayerNorm] | type[RMSNorm] = LayerNorm,
        layer_scale: bool = False,
        **attention: bool,
    ):
        L, D = config.depth, config.hidden_size
        options = dict(eps=config.layer_norm_eps, dtype=dtype, layers=L)
        self.norm1 = norm(D, **options)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype, **attention)
        self.norm2 = norm(D, **options)

        def scale():
            return parameter(jnp.full((L, D), 0.1, dtype), ("layers", "embed")) if layer_scale else None

        self.scale1, self.scale2 = scale(), scale()
        self.mlp = MLP(
            D,
            config.intermediate_size,
            activation,
            rngs=rngs,
            dtype=dtype,
            layers=L,
            residual_scale=1 / math.sqrt(2 * L),
        )

    def __call__(self, x_BPD, cos, sin, ids_BP, lengths_BM, longest: int | None, remat: str) -> jax.Array:
        def attend(block, x):
            out = block.attention(block.norm1(x), cos, sin, ids_BP, lengths_BM, longest)
            return out if block.scale1 is None else out * block.scale1[...].astype(out.dtype)

        with jax.named_scope("attention"):
            x_BPD = x_BPD + rematerialise_attention(attend, remat)(self, x_BPD)
        with jax.named_scope("mlp"):
            out = self.mlp(self.norm2(x_BPD))
            return x_BPD + (out if self.scale2 is None else out * self.scale2[...].astype(out.dtype))


class WholeImageTower(nnx.Module):
    """Base of towers whose blocks attend whole images with two-dimensional rotary positions; has `config`, `blocks`."""

    def tables(self, positions_BP2: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines of the patches' positions."""
        return vision_tables(positions_BP2, self.config.hidden_size // self.config.num_heads, self.config.rope_theta)

    def run_block(self, number: int, x_BPD: jax.Array, batch: Any) -> jax.Array:
        """One block on any input, for comparisons part by part."""
        block = jax.tree.map(lambda leaf: leaf[number], self.blocks)
        return block(x_BPD, *self.tables(batch.patch_positions), batch.patch_segment_ids, None, None, "none")


class SquareTower(nnx.Module):
    """Tower over squares of one size: learned positions, blocks that attend within a square, a class token or none
    (CLIP, InternViT, SigLIP).

    Squares lie one after another from the first patch on, each with all of its patches, so that they need no ids: the
    places of a row are cut into squares, and what is left over is computed and never read.

    Args:
      config: has also `image_side` and the geometry of patches.
      blocks: the stack; the first `used` of them are run.
      patch_bias: of the patch embedding. before: norm of what enters the first block; None is none.
      class_token: one more place in each square, before its patches; the table's first row is its position.
    """

    def __init__(
        self,
        config: Any,
        blocks: VisionBlock,
        *,
        used: int,
        patch_bias: bool,
        before: nnx.Module | None,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        rngs: nnx.Rngs,
        dtype,
        remat: str = "none",
        class_token: bool = True,
    ):
        D = config.hidden_size
        self.config, self.used, self.remat, self.statistics = config, used, remat, statistics
        self.patch_embed = Linear(config.patch_dim, D, ("patch", "embed"), bias=patch_bias, rngs=rngs, dtype=dtype)
        self.extra = int(class_token)

        def token():
            return parameter(jax.random.normal(rngs.params(), (D,), dtype) * 0.02, ("embed",))

        self.class_token = token() if class_token else None
        table = jax.random.normal(rngs.params(), (config.view_patches + self.extra, D), dtype) * 0.02
        self.positions = parameter(table, (None, None))
        self.before = before
        self.blocks = blocks

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
        """Features (B, P, D) of every patch, the class token left out.

        Args:
          patches: (B, P, patch_dim) uint8 pixels or normalised floats, square after square.
          All others are not read.
        """
        (B, P, _), N = patches.shape, self.config.view_patches
        squares = -(-P // N)
        with jax.named_scope("patch_embed"):
            x_BPD = embed_patches(self.patch_embed, patches, self.config, dtype, self.remat, *self.statistics)
            x_BPD = jnp.pad(x_BPD, ((0, 0), (0, squares * N - P), (0, 0))).reshape(B * squares, N, -1)
            if self.class_token is not None:
                first = jnp.broadcast_to(self.class_token[...].astype(dtype), (B * squares, 1, x_BPD.shape[-1]))
                x_BPD = jnp.concatenate([first, x_BPD], 1)
            x_BPD = x_BPD + self.positions[...][self._order()].astype(dtype)
            if self.before is not None:
                x_BPD = self.before(x_BPD)
        used = jax.tree.map(lambda leaf: leaf[: self.used], self.blocks)
        with jax.named_scope("blocks"):
            x_BPD = scan_layers(self._block_step(x_BPD, self.remat), x_BPD, used, remat=self.remat)
        return x_BPD[:, self.extra :].reshape(B, squares * N, -1)[:, :P]

    def run_block(self, number: int, x: jax.Array, batch: Any) -> jax.Array:
        """One block on any squares with their class tokens, for comparisons part by part."""
        x_BPD = x.reshape(-1, *x.shape[-2:])
        return self._block_step(x_BPD, "none")(x_BPD, jax.tree.map(lambda leaf: leaf[number], self.blocks))

    def _block_step(self, x_BPD, remat: str):
        ids_BP = jnp.ones(x_BPD.shape[:2], jnp.int32)
        return lambda x, block: block(x, None, None, ids_BP, None, None, remat)

    def _order(self) -> np.ndarray:
        """Row of the position table for a class token and each patch: patches of a visual token lie together."""
        side, merge = self.config.image_side // self.config.patch_size, self.config.spatial_merge_size
        raster = np.arange(side * side).reshape(side // merge, merge, side // merge, merge)
        return np.concatenate([np.arange(self.extra), self.extra + raster.swapaxes(1, 2).ravel()])


class PositionTable(nnx.Module):
    """Learned positions of a square grid, resized to each image's own by bilinear interpolation, corners on corners."""

    def __init__(self, side: int, width: int, *, rngs: nnx.Rngs, dtype):
        self.side = side
        table = jax.random.normal(rngs.params(), (side * side, width), dtype) * 0.02
        self.embedding = parameter(table, (None, None))

    def __call__(self, positions_BP2, ids_BP, lengths_BM) -> jax.Array:
        """(B, P, D) float32 of patches at (height, width) of their images.

        Args:
          ids_BP: image of each patch, from 1 in the row's order. lengths_BM: patches of each image; its last patch is
            its lower right corner.
        """
        ends_BM = jnp.maximum(jnp.cumsum(jnp.maximum(lengths_BM, 0), 1) - 1, 0)
        sizes_BM2 = jnp.take_along_axis(positions_BP2, ends_BM[..., None], 1, mode="clip") + 1
        sizes_BP2 = jnp.take_along_axis(sizes_BM2, jnp.maximum(ids_BP - 1, 0)[..., None], 1, mode="clip")
        place_BP2 = positions_BP2.astype(jnp.float32) * (self.side - 1) / jnp.maximum(sizes_BP2 - 1, 1)
        # Padding has the positions of no image.
        low_BP2 = jnp.clip(jnp.floor(place_BP2), 0, self.side - 1)
        part_BP2 = place_BP2 - low_BP2
        low_BP2 = low_BP2.astype(jnp.int32)
        high_BP2 = jnp.minimum(low_BP2 + 1, self.side - 1)
        total = 0.0
        for row_BP, of_row_BP in ((low_BP2[..., 0], 1 - part_BP2[..., 0]), (high_BP2[..., 0], part_BP2[..., 0])):
            for column_BP, share_BP in ((low_BP2[..., 1], 1 - part_BP2[..., 1]), (high_BP2[..., 1], part_BP2[..., 1])):
                rows_BPD = ops.embedding(self.embedding[...], row_BP * self.side + column_BP)
                total = total + rows_BPD * (of_row_BP * share_BP)[..., None]
        return total
