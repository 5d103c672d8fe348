"""The batch: the contract between data and model.

Legend: B rows, T token positions a row, P patch positions a row, M image segments a row, W windows a row, S samples a
row. A row holds several samples; segment 0 is padding, samples and images count from 1 within their row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mindvl_jax.data.processor import BatchSpec, Field

Array = Any  # np.ndarray on the host, jax.Array on devices


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of static shape. `mindvl_jax.models.batch` registers it as a JAX pytree.

    Attributes:
      tokens: (B, T) int32, ids of the model's vocabulary; the pad id where `segment_ids` is 0.
      targets: (B, T) int32, the id to predict at each place (the next token of the same sample), 0 where there is none.
      loss_weights: (B, T) float32, weight of each target's negative log-likelihood; 0 where nothing is learned.
      segment_ids: (B, T) int32, sample of each token position, 0 is padding.
      positions: (B, 3, T) int32, rotary positions (temporal, height, width); 1-D models read row 0.
      visual_index: (B, T) int32, which merged patch group of the row (0 .. P/4 - 1) feeds this place, -1 for text.
      source_ids: (B, T) int32, which source of the phase's mixture a place comes from, -1 for padding; for display
        only.
      segment_lengths: (B, S) int32, tokens of each sample in order, -1 padded. Padding tokens are not counted.
      patches: (B, P, patch_dim) uint8 pixels in (channel, frame, row, column) order, or float already normalised;
        patches lie in window order, the four patches of one merged token next to each other.
      patch_positions: (B, P, 2) int32, (height, width) of each patch in its image, in patches.
      patch_segment_ids: (B, P) int32, image (or video frame pair) of each patch, 0 is padding: full attention blocks.
      patch_window_ids: (B, P) int32, attention window of each patch, unique in the row, 0 is padding: window blocks.
      image_lengths: (B, M) int32, patches of each image segment in order, -1 padded.
      window_lengths: (B, W) int32, patches of each window in order, -1 padded.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    segment_ids: Array
    positions: Array
    visual_index: Array
    source_ids: Array
    segment_lengths: Array
    patches: Array
    patch_positions: Array
    patch_segment_ids: Array
    patch_window_ids: Array
    image_lengths: Array
    window_lengths: Array

    def fields(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def replace(self, **changes: Array) -> Batch:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of one phase's batch; `windows`, `images`, `samples` bound the lengths arrays."""

    rows: int
    tokens: int
    patches: int
    samples: int
    images: int
    windows: int
    patch_dim: int

    def spec(self) -> BatchSpec:
        """Every field with its shape, dtype and named dims."""
        B, T, P = self.rows, self.tokens, self.patches

        def field(*sizes_and_dims: tuple[int, str | None], dtype: str = "int32", fill: int = 0) -> Field:
            sizes, dims = zip((B, "rows"), *sizes_and_dims, strict=True)
            return Field(sizes, dtype, dims, fill)

        token, patch = (T, "tokens"), (P, "patches")
        return BatchSpec((
            ("tokens", field(token)),
            ("targets", field(token)),
            ("loss_weights", field(token, dtype="float32")),
            ("segment_ids", field(token)),
            ("positions", field((3, None), token)),
            ("visual_index", field(token, fill=-1)),
            ("source_ids", field(token, fill=-1)),
            ("segment_lengths", field((self.samples, None), fill=-1)),
            ("patches", field(patch, (self.patch_dim, None), dtype="uint8")),
            ("patch_positions", field(patch, (2, None))),
            ("patch_segment_ids", field(patch)),
            ("patch_window_ids", field(patch)),
            ("image_lengths", field((self.images, None), fill=-1)),
            ("window_lengths", field((self.windows, None), fill=-1)),
        ), make=Batch, capacities=(("tokens", "token_efficiency"), ("patches", "patch_efficiency")))  # fmt: skip

    def empty(self) -> Batch:
        """A batch of nothing but padding, on the host."""
        return self.spec().empty()
