"""MindVL: vision tower, projector and language model as one differentiable function of a packed batch.

B rows, T tokens, P patches, D language width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.batch import Batch
from mindvl_jax.models.layers.language_model import LanguageModel
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.visual_tokens import place_visual
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.vision import VisionTower


class MindVL(LanguageModel):
    """The assembled model.

    Parameters live under `vision/`, `projector/` and `language/`; layers are stacked on a leading axis. Created under a mesh
    and logical axis rules (see `models.parameters.parameter`) they are placed at once; `nnx.eval_shape` builds it without memory.
    """

    def __init__(self, config: MindVLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dtype = jnp.dtype(config.param_dtype)
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype, remat=config.remat)
        self.projector = Projector(config.vision.hidden_size, config.vision.merge_unit, config.text.hidden_size, eps=config.vision.rms_norm_eps, rngs=rngs, dtype=dtype)

    def visual_features(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, P / merge_unit, D): one visual token for each group of neighbouring patches, in window order."""
        with jax.named_scope("vision"):
            features = self.vision(batch.patches, batch.patch_positions, batch.patch_segment_ids, batch.patch_window_ids,
                                   image_lengths=batch.image_lengths, window_lengths=batch.window_lengths,
                                   max_image_patches=max_image_patches, dtype=self.compute_dtype)
        with jax.named_scope("projector"):
            return self.projector(features)

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): token embeddings with visual tokens in their places. Text-only batches run the same program."""
        visual_BGD = self.visual_features(batch, max_image_patches=max_image_patches)
        return place_visual(super().embed(batch), visual_BGD, batch.visual_index)
