"""Qwen3-VL (reference: transformers' Qwen3-VL, dense and routed).

B rows, P patches, G visual tokens, K tapped blocks, D tower width. Segment ids keep images and frame pairs apart;
window ids are not read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.linear import LayerNorm, Linear
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.stack import scan_layers
from mindvl_jax.models.layers.vision import PositionTable, VisionBlock, WholeImageTower, embed_patches
from mindvl_jax.models.layers.visual_tokens import LayerAdditions, place_visual
from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig
from mindvl_jax.models.vision_language.batch import Batch
from mindvl_jax.models.vision_language.model import VisionLanguageModel
from npu_bridge import ops

MEAN = STD = (0.5, 0.5, 0.5)
"""Channel statistics of the published preprocessing."""


class VisionTower(WholeImageTower):
    """Patch embedding, learned positions and blocks; the outputs of some blocks are given out beside the last."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype, remat: str = "none"):
        self.config = config
        self.remat = remat
        self.patch_embed = Linear(
            config.patch_dim, config.hidden_size, ("patch", "embed"), bias=True, rngs=rngs, dtype=dtype
        )
        self.position_table = PositionTable(config.table_side, config.hidden_size, rngs=rngs, dtype=dtype)
        self.blocks = VisionBlock(config, functools.partial(ops.gelu, approximate=True), rngs=rngs, dtype=dtype)

    def __call__(
        self,
        patches,
        positions_BP2,
        segment_ids_BP,
        window_ids_BP,
        *,
        image_lengths,
        window_lengths=None,
        max_image_patches: int | None = None,
        dtype,
    ) -> tuple[jax.Array, jax.Array]:
        """Features (B, P, D) of every patch, and (K, B, P, D) those after each tapped block.

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
            x_BPD = embed_patches(self.patch_embed, patches, self.config, dtype, self.remat, MEAN, STD)
            x_BPD = x_BPD + self.position_table(positions_BP2, segment_ids_BP, image_lengths).astype(dtype)
        tables = self.tables(positions_BP2)

        def block_step(x, block):
            return block(x, *tables, segment_ids_BP, image_lengths, max_image_patches, self.remat)

        taps, start = [], 0
        with jax.named_scope("blocks"):
            for end in (*(number + 1 for number in self.config.deepstack_blocks), self.config.depth):
                run = jax.tree.map(lambda leaf, start=start, end=end: leaf[start:end], self.blocks)
                if end > start:  # not after the last block where that is tapped itself
                    x_BPD = scan_layers(block_step, x_BPD, run, remat=self.remat)
                taps.append(x_BPD)
                start = end
        return x_BPD, jnp.stack(taps[:-1])


class DeepStackProjector(Projector):
    """The merger of the tower's output, and `deepstack`, one for each tapped block, which norms after merging."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs, dtype):
        D, unit, K = config.hidden_size, config.merge_unit, len(config.deepstack_blocks)
        common = dict(rngs=rngs, dtype=dtype)
        norm = LayerNorm(D, eps=config.layer_norm_eps, dtype=dtype)
        super().__init__(D, unit, width, norm=norm, **common)
        norm = LayerNorm(D * unit, eps=config.layer_norm_eps, dtype=dtype, name="merged", layers=K)
        self.deepstack = Projector(D, unit, width, norm=norm, norm_merged=True, layers=K, **common)

    def project_taps(self, taps_KBPD: jax.Array) -> jax.Array:
        """(K, B, G, language width)."""

        def one(_, merger_and_tap):
            merger, tap_BPD = merger_and_tap
            return None, merger(tap_BPD)

        return jax.lax.scan(one, None, (self.deepstack, taps_KBPD), unroll=True)[1]


class Qwen3VL(VisionLanguageModel):
    """The assembled model. Its text is Qwen3's, dense or routed."""

    def __init__(self, config: Qwen3VLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype, vision = jnp.dtype(config.param_dtype), config.vision
        self.vision = VisionTower(vision, rngs=rngs, dtype=dtype, remat=config.remat)
        self.projector = DeepStackProjector(vision, config.text.hidden_size, rngs=rngs, dtype=dtype)

    def decoder_inputs(self, batch: Batch, *, max_image_patches: int | None = None):
        """Return embeddings with visual tokens inserted, and what the decoder adds after its first layers."""
        features_BPD, taps_KBPD = self.tower_features(batch, max_image_patches=max_image_patches)
        with jax.named_scope("projector"):
            visual_BGD, added_KBGD = self.projector(features_BPD), self.projector.project_taps(taps_KBPD)
        tokens_BTD = self.language.embed(batch.tokens).astype(self.compute_dtype)
        inputs_BTD = place_visual(tokens_BTD, visual_BGD, batch.visual_index)
        return inputs_BTD, {"added": LayerAdditions(added_KBGD, batch.visual_index)}

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        return self.decoder_inputs(batch, max_image_patches=max_image_patches)[0]
