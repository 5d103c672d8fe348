"""The objective of a phase, by the model family's choice."""

from __future__ import annotations

from mindvl_jax.config.schema import ModelConfig, PhaseConfig
from mindvl_jax.models.vision_language.counts import COUNTS
from mindvl_jax.objectives import routed_sft, sft
from mindvl_jax.objectives.base import Objective


def make_objective(model: ModelConfig, phase: PhaseConfig, *, loss_chunk: int) -> Objective:
    """What `model` learns in `phase`."""
    common = dict(loss_chunk=loss_chunk, counts=COUNTS)
    moe = getattr(model.text, "moe", None)
    if moe is None:
        return sft.for_phase(phase, **common)
    return routed_sft.for_phase(phase, moe, layers=model.text.num_layers - model.text.dense_layers, **common)
