"""Floating-point operations of a training step of the diffusion transformer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import jax

from mindvl_jax.models.counts import StepFlops
from mindvl_jax.models.dit.config import DiTConfig


class FlopCounter:
    """FLOPs of a step from its counts; forward, and twice that for the gradients of everything (a phase rarely freezes
    a part).
    """

    def __init__(self, model: DiTConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], trained: Collection[str]):
        kernels = {path: math.prod(shape.shape) for path, shape in shapes.items() if path.endswith("/kernel")}
        # Conditions are computed once an image, everything else once a patch.
        once = sum(
            size
            for path, size in kernels.items()
            if path.startswith(("condition/", "head_modulation/")) or "/modulation/" in path
        )
        self._image, self._patch = 2.0 * once, 2.0 * (sum(kernels.values()) - once)
        self._attention = 4.0 * model.num_layers * model.hidden_size * model.tokens
        self._passes = 3.0 if trained else 1.0

    def __call__(self, counts: Mapping[str, float]) -> StepFlops:
        """All of it counts as the tower's: there is no language model. A multiply-add is two operations."""
        return StepFlops(
            language=0.0,
            vision=self._passes
            * (self._image * counts["samples"] + (self._patch + self._attention) * counts["tokens"]),
        )
