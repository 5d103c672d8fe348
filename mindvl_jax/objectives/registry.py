"""The objective of a phase, by the model family's choice."""

from __future__ import annotations

from mindvl_jax.config.schema import FlowMatchingConfig, ModelConfig, PhaseConfig
from mindvl_jax.models.registry import spec_of
from mindvl_jax.objectives import flow_matching, routed_sft, sft
from mindvl_jax.objectives.base import Objective


def make_objective(
    model: ModelConfig, phase: PhaseConfig, *, loss_chunk: int = 1024, flow: FlowMatchingConfig | None = None
) -> Objective:
    """Return the objective of `model` in `phase`.

    Args:
      loss_chunk: `training.loss_chunk`, of `sft`. flow: `training.flow_matching`, of `flow_matching`; default: its
        defaults.

    Raises:
      ValueError: the family names an objective that does not exist.
    """
    spec = spec_of(model)
    if spec.objective == "flow_matching":
        return flow_matching.for_phase(flow or FlowMatchingConfig(), tokens=phase.sequence_length)
    if spec.objective != "sft":
        raise ValueError(f"family {spec.name!r} names objective {spec.objective!r}; there are sft and flow_matching")
    common = dict(loss_chunk=loss_chunk, counts=spec.counts.get())
    moe = getattr(model.text, "moe", None)
    if moe is None:
        return sft.for_phase(phase, **common)
    text = model.text
    heads = dict(mtp_heads=getattr(text, "mtp_layers", 0), mtp_loss=getattr(text, "mtp_loss", 0.0))
    return routed_sft.for_phase(phase, moe, layers=text.num_layers - text.dense_layers, **common, **heads)
