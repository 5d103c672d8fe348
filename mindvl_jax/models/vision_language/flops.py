"""Floating-point operations of a training step, from what the batch really held, for MFU.

Counted is what the mathematics needs: real tokens and patches (no padding), attention inside segments and windows, the
output head at labelled positions only, gradients of trained parts only. Remat's recomputation is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax

from mindvl_jax.core.params import count_weights
from mindvl_jax.models.counts import StepFlops


class FlopCounter:
    """FLOPs of a step from its counts (`vision_language.counts`)."""

    def __init__(self, model: Any, shapes: Mapping[str, jax.ShapeDtypeStruct], trained: Collection[str]):
        self._model = model

        moe = getattr(model.text, "moe", None)

        def products(path: str) -> float:
            """Multiply-adds of a token in a parameter's matrix product; of all experts a token passes k."""
            if moe is not None and "/experts/" in path:
                return math.prod(shapes[path].shape) * moe.experts_per_token / moe.experts
            return float(count_weights(path, shapes[path])) if path.endswith(("/kernel", "/nf4_codes")) else 0.0

        def kernels(*prefixes: str) -> float:
            return float(sum(products(path) for path in shapes if path.startswith(prefixes)))

        def learns(*prefixes: str) -> bool:
            return any(path.startswith(prefixes) for path in trained)

        def share(*prefixes: str) -> float:
            """Part of the products under `prefixes` whose own weights learn."""
            whole = kernels(*prefixes)
            own = sum(products(path) for path in trained if path.startswith(prefixes))
            return own / whole if whole else 0.0

        # 1 forward + 1 for the weights' gradients where they learn + 1 for the inputs' gradients where something
        # upstream learns.
        self._vision_kernels = kernels("vision/") * (1 + share("vision/") + learns("vision/"))
        self._projector_kernels = kernels("projector/") * (1 + share("projector/") + learns("vision/", "projector/"))
        decoder = ("language/layers/", "language/dense/", "language/mtp/")
        upstream = learns("vision/", "projector/", "language/")
        self._language_kernels = kernels(*decoder) * (1 + share(*decoder) + upstream)
        text = model.text
        head_learns = learns("language/embed/" if text.tie_word_embeddings else "language/head/")
        heads = 1 + getattr(text, "mtp_layers", 0)
        self._head = heads * text.hidden_size * text.vocab_size * (1.0 + head_learns + upstream)
        self._language_attention = 3.0 if upstream else 1.0
        self._vision_attention = 3.0 if learns("vision/") else 1.0

    def __call__(self, counts: Mapping[str, float]) -> StepFlops:
        """A multiply-add is two operations."""
        text, vision = self._model.text, getattr(self._model, "vision", None)
        language = 2 * (self._language_kernels * counts["tokens"] + self._head * counts["label_tokens"])
        # Scores and weighted values: two products; causal attention needs half of the square.
        language += self._language_attention * 2 * text.pair_products * counts["segment_squares"]
        if vision is None:
            return StepFlops(language=language, vision=0.0)
        tower = 2 * (
            self._vision_kernels * counts["patches"] + self._projector_kernels * counts["patches"] / vision.merge_unit
        )
        full = vision.full_blocks
        squares = full * counts["image_squares"] + (vision.depth - full) * counts["window_squares"]
        tower += self._vision_attention * 4 * vision.hidden_size * squares
        return StepFlops(language=language, vision=tower)
