"""Cost of each sample in the language model and vision tower, to balance the rows of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Columns of the size and load tables that rows are planned from.
TOKENS, PATCHES = range(2)
LANGUAGE, VISION = range(2)


@dataclasses.dataclass(frozen=True)
class WorkModel:
    """Multiply-adds of one sample: linear per token and patch, quadratic per attention segment. Units cancel out."""

    token: float
    token_pair: float
    patch: float
    patch_pair: float

    @classmethod
    def of(cls, model: Any) -> WorkModel:
        """Count matrix products of a decoder layer and a vision block (window attention is linear in patches)."""
        text, vision = model.text, getattr(model, "vision", None)
        if not hasattr(vision, "depth"):  # a language model alone: no tower, no work for patches
            return cls(
                token=text.token_products + text.hidden_size * text.vocab_size,
                token_pair=text.pair_products,
                patch=0.0,
                patch_pair=0.0,
            )
        # Without windows every block attends over the whole image.
        window = 0 if vision.window_size is None else (vision.window_size // vision.patch_size) ** 2
        full = vision.full_blocks
        width = vision.hidden_size
        block = 4 * width**2 + 3 * width * vision.intermediate_size
        return cls(
            token=text.token_products + text.hidden_size * text.vocab_size,
            token_pair=text.pair_products,
            patch=vision.depth * block + (vision.depth - full) * 2 * width * window,
            patch_pair=full * 2 * width,
        )

    def loads(self, tokens: int, image_lengths: np.ndarray) -> tuple[float, float]:
        """Work of one sample in the language model and in the vision tower."""
        patches = float(image_lengths.sum())
        squares = float((image_lengths.astype(np.float64) ** 2).sum())
        return self.token * tokens + self.token_pair * float(
            tokens
        ) ** 2, self.patch * patches + self.patch_pair * squares
