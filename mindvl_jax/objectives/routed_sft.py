"""Supervised fine-tuning of models with routed experts: token loss, balancing terms, the selection bias.

L routed layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.config.schema import PhaseConfig
from mindvl_jax.models.counts import Counts
from mindvl_jax.models.layers.config import MoEConfig
from mindvl_jax.objectives import routing, sft
from mindvl_jax.objectives.base import LossTerms, Params
from mindvl_jax.objectives.sft import SOURCES, Sft, by_source, loss_terms

BIAS = "language/layers/moe/router/bias"
LOAD = "expert_load"


@dataclasses.dataclass(frozen=True)
class RoutedSft(Sft):
    """`Sft` for a model with `routed_losses`.

    The balancing terms of a micro-batch are weighted by its denominator, so the loss of a step is the token loss plus
    the weighted mean of its micro-batches' terms. The bias moves once a step, by the load of the whole global batch.

    Attributes:
      moe: of the model. layers: L.
    """

    moe: MoEConfig = dataclasses.field(kw_only=True)
    layers: int = dataclasses.field(kw_only=True)

    @property
    def metric_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**super().metric_shapes, LOAD: (self.layers, self.moe.experts), "balance": (), "router_z": ()}

    def loss(self, model: nnx.Module, batch: Any, key: None = None) -> LossTerms:
        losses_BT, routed = model.routed_losses(batch, chunk=self.chunk, **dict(self.bounds))
        with jax.named_scope("reduce_loss"):
            numerator, denominator = loss_terms(
                losses_BT, batch.loss_weights, batch.segment_ids, samples=self.samples, reduction=self.gradients_by
            )
            sums = by_source(losses_BT, batch.loss_weights, batch.source_ids, self.sources)
        counts = self.counts.function(batch)
        with jax.named_scope("router_losses"):
            tokens, segments = jnp.maximum(counts["tokens"], 1), jnp.maximum(counts["samples"], 1)
            balance, z = routing.balance(routed, self.moe, tokens, segments=segments), routing.z(routed, tokens)
            numerator = numerator + (self.moe.balance_loss * balance + self.moe.z_loss * z) * denominator
        load_LE = jax.lax.stop_gradient(routed.load)
        metrics = {**counts, SOURCES: sums, LOAD: load_LE, "balance": balance * tokens, "router_z": z * tokens}
        return LossTerms(numerator, denominator, metrics, None if self.aux_shapes is None else load_LE)

    def for_validation(self) -> RoutedSft:
        """Without the balancing terms, which depend on how samples were batched."""
        still = self.moe.model_copy(update=dict(balance_loss=0.0, z_loss=0.0, bias_update_rate=0.0))
        return dataclasses.replace(self, gradients_by="token", moe=still, aux_shapes=None)

    def after_update(self, params: Params, aux: Any) -> Params:
        if BIAS not in params:  # the decoder is frozen in this phase
            return params
        return {**params, BIAS: routing.moved_bias(params[BIAS], aux, self.moe.bias_update_rate)}

    def display(self, values: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
        """As `Sft`, the balancing terms, and the highest load of an expert over the mean: of the worst layer and on
        average over layers.

        `dropped_tokens` is counted, not assumed: k times the tokens less what the experts got.
        """
        load_LE = np.asarray(values[LOAD], np.float64)
        share_L = load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9)
        tokens = float(values["tokens"])
        shown = {name: float(values[name]) / max(tokens, 1.0) for name in ("balance", "router_z")}
        shown |= {"expert_load_worst": float(share_L.max()), "expert_load_mean": float(share_L.mean())}
        dropped = self.moe.experts_per_token * tokens * self.layers - load_LE.sum()
        return super().display(values, sources) | shown | {"dropped_tokens": round(dropped)}


def for_phase(phase: PhaseConfig, moe: MoEConfig, *, layers: int, loss_chunk: int, counts: Counts) -> RoutedSft:
    """The objective of one phase of a run with `layers` routed layers."""
    plain = sft.for_phase(phase, loss_chunk=loss_chunk, counts=counts)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    aux = jax.ShapeDtypeStruct((layers, moe.experts), jnp.float32) if moe.bias_update_rate else None
    return RoutedSft(**fields | {"aux_shapes": aux}, moe=moe, layers=layers)
