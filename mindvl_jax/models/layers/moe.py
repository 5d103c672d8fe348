"""Mixture of experts: routing, grouped experts, what balancing needs to know.

B rows, T tokens, D width, F feed-forward width of an expert, E experts, k experts a token, L layers.

Every token goes to all k experts that the router chooses: no expert has a capacity, no token is ever dropped. Padding
is computed like any token (its rows would have to move otherwise) but counts nowhere.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.config import MoEConfig
from mindvl_jax.models.layers.linear import GatedMLP, initial_std, parameter
from mindvl_jax.parallel.experts import routed
from npu_bridge import ops

# Named dims of each expert matrix (E, inputs, outputs): what the expert and tensor axes may split.
MATRICES = {"gate": ("experts", None, "mlp"), "up": ("experts", None, "mlp"), "down": ("experts", "mlp", None)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Statistics of one layer's router, summed over the real tokens of all rows; stacked (L, ..) for a decoder. All
    float32.

    Attributes:
      load: (E,) tokens that each expert got, counted where it computed them; the sum is k times the tokens.
      probability: (E,) sum of each expert's normalised score.
      sequence_balance: scalar, sum over segments of DeepSeek-V3's sequence-wise loss (report section 2.1.2), without
        its factor.
      z: scalar, sum of the squared log-partition of the logits (ST-MoE's z-loss).
    """

    load: jax.Array
    probability: jax.Array
    sequence_balance: jax.Array
    z: jax.Array


class Router(nnx.Module):
    """Scores of all experts in float32, whatever the computation's dtype: near ties decide which expert learns.

    Attributes:
      kernel: (D, E). bias: (E,) added for the choice only and moved by load, not by gradients; None for softmax
        routers.
    """

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs, dtype, layers: int):
        kernel = jax.random.normal(rngs.params(), (layers, width, config.experts), dtype) * initial_std(width)
        self.kernel = parameter(kernel, ("layers", "embed", None))
        self.bias = (
            parameter(jnp.zeros((layers, config.experts), jnp.float32), ("layers", None))
            if config.selection_bias
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


class ExpertAdapter(nnx.Module):
    """A low-rank adapter of each expert's matrix; see `layers.lora`.

    Attributes:
      lora_a: (E, D, r), or (L, E, D, r) stacked. lora_b: (E, r, F). lora_scale: alpha over rank.
    """

    def __init__(self, lora_a: nnx.Param, lora_b: nnx.Param, scale: float):
        self.lora_a, self.lora_b, self.lora_scale = lora_a, lora_b, scale


class Experts(nnx.Module):
    """E gated feed-forward networks as three stacked matrices.

    Attributes:
      gate, up: (L, E, D, F). down: (L, E, F, D). gate_adapter, up_adapter, down_adapter: set by
        `models.adapters.attach`.
    """

    gate_adapter: ExpertAdapter | None = None
    up_adapter: ExpertAdapter | None = None
    down_adapter: ExpertAdapter | None = None

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs, dtype, layers: int, residual_scale: float):
        E, F = config.experts, config.intermediate_size

        def stacked(inputs: int, outputs: int, names: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            kernel = jax.random.normal(rngs.params(), (layers, E, inputs, outputs), dtype) * (
                initial_std(inputs) * scale
            )
            return parameter(kernel, ("layers", "experts", *names))

        self.gate = stacked(width, F, ("embed", "mlp"))
        self.up = stacked(width, F, ("embed", "mlp"))
        self.down = stacked(F, width, ("mlp", "embed"), residual_scale)

    def arrays(self) -> tuple[list[jax.Array], list[tuple[str | None, ...]]]:
        """Arrays of one layer as `products` takes them, and the named dims of each."""
        arrays, dims = [], []
        for name, of_kernel in MATRICES.items():
            arrays.append(getattr(self, name)[...])
            dims.append(of_kernel)
            if (adapter := getattr(self, f"{name}_adapter")) is not None:
                arrays += [adapter.lora_a[...], adapter.lora_b[...]]
                dims += [("experts", of_kernel[1], None), ("experts", None, of_kernel[2])]
        return arrays, dims

    def products(self, x_MD: jax.Array, sizes_E: jax.Array, *arrays: jax.Array) -> jax.Array:
        """Rows sorted by expert -> rows."""
        left = iter(arrays)

        def product(x, name):
            y = ops.grouped_matmul(x, next(left), sizes_E)
            if (adapter := getattr(self, f"{name}_adapter")) is None:
                return y
            with jax.named_scope("lora"):
                low = ops.grouped_matmul(x, next(left).astype(x.dtype), sizes_E)
                return y + ops.grouped_matmul(low, next(left).astype(x.dtype), sizes_E) * jnp.asarray(
                    adapter.lora_scale, x.dtype
                )

        return product(ops.swiglu(product(x_MD, "gate"), product(x_MD, "up")), "down")


class MoE(nnx.Module):
    """Router, experts and, in DeepSeek's form, experts that every token passes."""

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs, dtype, layers: int, depth: int):
        """`layers` of the stack; `depth` of the whole model scales the residual outputs."""
        self.config = config
        scale = 1 / math.sqrt(2 * depth)
        self.router = Router(config, width, rngs=rngs, dtype=dtype, layers=layers)
        self.experts = Experts(config, width, rngs=rngs, dtype=dtype, layers=layers, residual_scale=scale)
        shared = config.shared_experts * config.intermediate_size
        self.shared = (
            GatedMLP(width, shared, bias=False, rngs=rngs, dtype=dtype, layers=layers, residual_scale=scale)
            if shared
            else None
        )

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> tuple[jax.Array, Routing]:
        """-> (B, T, D) and what the router did.

        Args:
          segment_ids_BT: samples of packed rows, 0 is padding; None: one sample a row, no padding.
        """
        config = self.config

        def route(logits_NE, bias_E):
            return ops.moe_gating(
                logits_NE,
                k=config.experts_per_token,
                scoring=config.scoring,
                bias=bias_E,
                groups=config.groups,
                groups_kept=config.groups_kept,
                renormalize=config.renormalize,
                scale=config.scale,
            )

        real_BT = jnp.ones(x_BTD.shape[:2], bool) if segment_ids_BT is None else segment_ids_BT > 0
        bias_E = None if self.router.bias is None else self.router.bias[...]
        with jax.named_scope("router"):
            logits_BTE = self.router(x_BTD)
        with jax.named_scope("experts"):
            arrays, dims = self.experts.arrays()
            out_BTD, experts_BTk, load_E = routed(
                route, self.experts.products, x_BTD, logits_BTE, real_BT, arrays, dims, bias_E
            )
        with jax.named_scope("router"):
            routing = _describe(logits_BTE, experts_BTk, load_E, segment_ids_BT, config)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                out_BTD = out_BTD + self.shared(x_BTD)
        return out_BTD, routing


def _describe(logits_BTE, experts_BTk, load_E, segment_ids_BT, config: MoEConfig) -> Routing:
    real_BT = (
        jnp.ones(logits_BTE.shape[:2], jnp.float32)
        if segment_ids_BT is None
        else (segment_ids_BT > 0).astype(jnp.float32)
    )
    scores_BTE = jax.nn.softmax(logits_BTE, -1) if config.scoring == "softmax" else jax.nn.sigmoid(logits_BTE)
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, -1, keepdims=True) + 1e-20) * real_BT[..., None]
    chosen_BTE = jnp.sum(jax.nn.one_hot(experts_BTk, config.experts, dtype=jnp.float32), 2) * real_BT[..., None]
    chosen_BTE = jax.lax.stop_gradient(chosen_BTE)
    return Routing(
        load=load_E,
        probability=jnp.sum(share_BTE, (0, 1)),
        sequence_balance=_sequence_balance(chosen_BTE, share_BTE, segment_ids_BT, config),
        z=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, -1)) * real_BT),
    )


def _sequence_balance(chosen_BTE, share_BTE, segment_ids_BT, config: MoEConfig) -> jax.Array:
    """Sum over segments of sum_i f_i P_i: f_i the share of the segment's choices that fell on expert i, times E, P_i
    its mean score.

    Segments are runs of equal ids, so their sums are differences of running sums at their ends: no array has a dim for
    segments, and memory stays linear in the row.
    """
    if not config.sequence_balance:
        return jnp.zeros((), jnp.float32)
    B, T, E = chosen_BTE.shape
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    index_T = jnp.arange(T)
    starts_BT = ids_BT != jnp.pad(ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    ends_BT = ids_BT != jnp.pad(ids_BT, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    first_BT = jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)

    def run_sums(values_BTE):
        """At each place the sum over its run up to it."""
        sums_BTE = jnp.cumsum(values_BTE, 1)
        before_BTE = jnp.take_along_axis(jnp.pad(sums_BTE, ((0, 0), (1, 0), (0, 0))), first_BT[..., None], 1)
        return sums_BTE - before_BTE

    tokens_BT = (index_T - first_BT + 1).astype(jnp.float32)
    per_segment_BT = (
        jnp.sum(run_sums(chosen_BTE) * run_sums(share_BTE), -1) * E / (config.experts_per_token * tokens_BT**2)
    )
    return jnp.sum(jnp.where(ends_BT & (ids_BT > 0), per_segment_BT, 0.0))
