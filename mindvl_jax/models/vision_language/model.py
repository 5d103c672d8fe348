"""A decoder that reads visual tokens among its text: tower, projector, language model.

B rows, T tokens, P patches, D language width.
"""

from __future__ import annotations

import jax
from flax import nnx

from mindvl_jax.models.layers.language_model import LanguageModel
from mindvl_jax.models.layers.visual_tokens import place_visual
from mindvl_jax.models.vision_language.batch import Batch


class VisionLanguageModel(LanguageModel):
    """Base of such families; a family's class sets `vision` (called as below) and `projector`.

    Parameters live under `vision/`, `projector/` and `language/`.
    """

    vision: nnx.Module
    projector: nnx.Module

    def tower_features(self, batch: Batch, *, max_image_patches: int | None = None):
        """Run the vision tower on a batch's patches."""
        with jax.named_scope("vision"):
            return self.vision(
                batch.patches,
                batch.patch_positions,
                batch.patch_segment_ids,
                batch.patch_window_ids,
                image_lengths=batch.image_lengths,
                window_lengths=batch.window_lengths,
                max_image_patches=max_image_patches,
                dtype=self.compute_dtype,
            )

    def visual_features(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, P / merge_unit, D): one visual token for each group of neighbouring patches, in window order."""
        features = self.tower_features(batch, max_image_patches=max_image_patches)
        with jax.named_scope("projector"):
            return self.projector(features)

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): token embeddings with visual tokens inserted. Text-only batches run the same program."""
        visual_BGD = self.visual_features(batch, max_image_patches=max_image_patches)
        return place_visual(super().embed(batch), visual_BGD, batch.visual_index)
