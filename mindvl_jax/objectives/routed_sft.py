"""Supervised fine-tuning of models with routed experts: token loss, balancing terms, the selection bias, MTP heads.

L routed layers, E experts, M MTP heads, whose routers stand behind those of the layers.
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
MTP_BIAS = "language/mtp/layer/moe/router/bias"
LOAD = "expert_load"
NAMED_LOADS = 64
"""Most routed layers times experts whose loads are shown one by one."""


@dataclasses.dataclass(frozen=True)
class RoutedSft(Sft):
    """`Sft` for a model with `routed_losses`.

    The balancing terms of a micro-batch are weighted by its denominator, so the loss of a step is the token loss plus
    the weighted mean of its micro-batches' terms. The bias moves once a step, by the load of the whole global batch.

    The loss of an MTP head is divided by what the main loss is divided by, as in DeepSeek-V3's report (section 2.2: by
    the length of the sequence, though a head predicts fewer tokens): so neither packing nor accumulation changes it.

    Attributes:
      moe: of the model. layers: L. mtp_heads: M. mtp_loss: factor of the mean of the heads' losses.
    """

    moe: MoEConfig = dataclasses.field(kw_only=True)
    layers: int = dataclasses.field(kw_only=True)
    mtp_heads: int = 0
    mtp_loss: float = 0.0

    @property
    def metric_shapes(self) -> Mapping[str, tuple[int, ...]]:
        load = (self.layers + self.mtp_heads, self.moe.experts)
        heads = {"mtp_losses": (self.mtp_heads, 2), "mtp_tokens": (self.mtp_heads,)} if self.mtp_heads else {}
        bias = {"router_bias": (2,)} if self.moe.selection_bias else {}
        return {**super().metric_shapes, LOAD: load, "balance": (), "router_z": (), **heads, **bias}

    def loss(self, model: nnx.Module, batch: Any, key: None = None) -> LossTerms:
        found = model.routed_losses(batch, chunk=self.chunk, mtp=self.mtp_heads > 0, **dict(self.bounds))
        losses_BT, routed, mtp = found
        with jax.named_scope("reduce_loss"):
            every_BT, heads = losses_BT, {}
            if mtp is not None:
                every_BT = losses_BT + self.mtp_loss * jnp.mean(mtp.losses_MBT, 0)
                sums_M2 = jnp.stack([jnp.sum(mtp.losses_MBT, (1, 2)), jnp.sum(mtp.weights_MBT, (1, 2))], -1)
                heads = {"mtp_losses": sums_M2, "mtp_tokens": mtp.tokens_M}
            numerator, denominator = loss_terms(
                every_BT, batch.loss_weights, batch.segment_ids, samples=self.samples, reduction=self.gradients_by
            )
            sums = by_source(losses_BT, batch.loss_weights, batch.source_ids, self.sources)
        counts = self.counts.function(batch)
        with jax.named_scope("router_losses"):
            tokens, segments = jnp.maximum(counts["tokens"], 1), jnp.maximum(counts["samples"], 1)
            balance, z = routing.balance(routed, self.moe, tokens, segments=segments), routing.z(routed, tokens)
            numerator = numerator + (self.moe.balance_loss * balance + self.moe.z_loss * z) * denominator
        load_LE = jax.lax.stop_gradient(routed.load)
        if self.moe.selection_bias:  # summed over micro-steps, as are all metrics: so their number goes along
            bias_LE = jax.lax.stop_gradient(model.language.layers.moe.router.bias[...])
            heads["router_bias"] = jnp.stack([jnp.max(jnp.abs(bias_LE)), jnp.float32(1)])
        metrics = {**counts, SOURCES: sums, LOAD: load_LE, "balance": balance * tokens, "router_z": z * tokens, **heads}
        return LossTerms(numerator, denominator, metrics, None if self.aux_shapes is None else load_LE)

    def for_validation(self) -> RoutedSft:
        """Without the balancing terms, which depend on how samples were batched, and without the MTP heads."""
        still = self.moe.model_copy(update=dict(balance_loss=0.0, z_loss=0.0, bias_update_rate=0.0))
        return dataclasses.replace(self, gradients_by="token", moe=still, mtp_heads=0, aux_shapes=None)

    def after_update(self, params: Params, aux: Any) -> Params:
        """Move the biases that are trained; a frozen decoder keeps its own."""
        loads = {BIAS: aux[: self.layers], MTP_BIAS: aux[self.layers :]}
        rate = self.moe.bias_update_rate
        return params | {
            path: routing.moved_bias(params[path], load, rate) for path, load in loads.items() if path in params
        }

    def display(self, values: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
        """As `Sft`, the balancing terms, and the highest load of an expert over the mean: of the worst layer and on
        average over layers. `expert_load/L.E` is that share of each expert, in models with few of them; `router_bias`
        the largest selection bias, up or down.

        `dropped_tokens` is counted, not assumed: k times the tokens less what the experts got. `mtp_loss` is the mean
        over the tokens that the heads predict.
        """
        load_LE = np.asarray(values[LOAD], np.float64)
        share_L = load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9)
        tokens = float(values["tokens"])
        shown = {name: float(values[name]) / max(tokens, 1.0) for name in ("balance", "router_z")}
        shown |= {"expert_load_worst": float(share_L.max()), "expert_load_mean": float(share_L.mean())}
        if load_LE.size <= NAMED_LOADS:
            even_L1 = np.maximum(load_LE.mean(-1, keepdims=True), 1e-9)
            shares = np.ndenumerate(load_LE / even_L1)
            shown |= {f"{LOAD}/{layer}.{expert}": round(float(share), 4) for (layer, expert), share in shares}
        if "router_bias" in values:
            shown["router_bias"] = float(values["router_bias"][0] / max(float(values["router_bias"][1]), 1.0))
        routed = tokens * self.layers
        if self.mtp_heads:
            losses_M2 = np.asarray(values["mtp_losses"], np.float64)
            shown["mtp_loss"] = float(np.mean(losses_M2[:, 0] / np.maximum(losses_M2[:, 1], 1e-9)))
            routed += float(np.sum(values["mtp_tokens"]))
        dropped = self.moe.experts_per_token * routed - load_LE.sum()
        return super().display(values, sources) | shown | {"dropped_tokens": round(dropped)}


def for_phase(
    phase: PhaseConfig,
    moe: MoEConfig,
    *,
    layers: int,
    loss_chunk: int,
    counts: Counts,
    mtp_heads: int = 0,
    mtp_loss: float = 0.0,
) -> RoutedSft:
    """The objective of one phase of a run with `layers` routed layers and `mtp_heads` behind them."""
    plain = sft.for_phase(phase, loss_chunk=loss_chunk, counts=counts)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    aux = jax.ShapeDtypeStruct((layers + mtp_heads, moe.experts), jnp.float32) if moe.bias_update_rate else None
    heads = dict(mtp_heads=mtp_heads, mtp_loss=mtp_loss)
    return RoutedSft(**fields | {"aux_shapes": aux}, moe=moe, layers=layers, **heads)
