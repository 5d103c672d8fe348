"""Parameters with logical axis names, and the three layers that everything is made of.

Layers of one kind are stored stacked: with `layers=L` every parameter has a leading axis of size L and a module stands
for the whole stack. `jax.lax.scan` over such a module (NNX modules are pytrees) hands its body one layer's module, so
the forward methods below are written for a single layer and never see the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd

from mindvl_jax.models.layers.lora import adapted_linear
from mindvl_jax.models.layers.nf4 import Nf4, product
from mindvl_jax.parallel.activations import constrain_features, constrain_whole
from npu_bridge import ops

LOGICAL_AXES = (
    "layers", "patch", "embed", "latent", "heads", "kv_heads", "head_dim", "mlp", "merged", "vocab", "experts",
)  # fmt: skip
"""Every axis name that a parameter of this package carries; `mindvl_jax.parallel` maps each to mesh axes."""


def parameter(value: jax.Array, names: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that knows what its axes mean.

    Created under `jax.set_mesh(mesh)` and `nnx.logical_axis_rules(rules)` it is placed by those rules; created without
    them it stays where it is, and the names wait for whoever places it later.
    """
    if len(names) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} has {len(names)} axis names {names}; expected one per axis")
    placed = bool(spmd.get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
    return nnx.Param(value, out_sharding=names, eager_sharding=placed)


def initial_std(fan_in: int) -> float:
    """0.02 as published for 1,000 inputs and more; larger for narrow layers, whose signal would vanish."""
    return max(0.02, math.sqrt(0.4 / fan_in))


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`.

    Attributes:
      kernel: (D, F), or (L, D, F) stacked; None where the matrix is held in NF4.
      nf4_codes, nf4_absmax: of such a matrix, set by `models.adapters.hold_in_nf4`; see `layers.nf4`.
      bias: (F,), or (L, F) stacked; None without.
      lora_a, lora_b, lora_magnitude, lora_scale: of a low-rank adapter, set by `models.adapters.attach`; see
        `layers.lora`.
    """

    nf4_codes: nnx.Param | None = None
    nf4_absmax: nnx.Param | None = None
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_magnitude: nnx.Param | None = None
    lora_scale: float = 1.0

    def __init__(
        self,
        inputs: int,
        outputs: int,
        names: tuple[str | None, str | None],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        dtype,
        layers: int | None = None,
        scale: float = 1.0,
    ):
        lead, lead_names = ((), ()) if layers is None else ((layers,), ("layers",))
        kernel = jax.random.normal(rngs.params(), (*lead, inputs, outputs), dtype) * (initial_std(inputs) * scale)
        self.kernel = parameter(kernel, (*lead_names, *names))
        self.output_dim = names[1]
        self.bias = parameter(jnp.zeros((*lead, outputs), dtype), (*lead_names, names[1])) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        kernel = self.kernel[...] if self.nf4_codes is None else Nf4(self.nf4_codes[...], self.nf4_absmax[...])
        if self.lora_a is None:
            y = product(x, kernel, bias)
        else:
            magnitude = None if self.lora_magnitude is None else self.lora_magnitude[...]
            y = adapted_linear(x, kernel, bias, self.lora_a[...], self.lora_b[...], self.lora_scale, magnitude)
        return constrain_features(y, self.output_dim)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale: (D,), or (L, D) stacked."""

    def __init__(self, width: int, *, eps: float, dtype, name: str | None = "embed", layers: int | None = None):
        lead, lead_names = ((), ()) if layers is None else ((layers,), ("layers",))
        self.eps, self.of_residual = eps, name == "embed"
        self.scale = parameter(jnp.ones((*lead, width), dtype), (*lead_names, name))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.rms_norm(x, self.scale[...], eps=self.eps)
        return constrain_whole(y) if self.of_residual else y


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool, rngs: nnx.Rngs, dtype, layers: int, residual_scale: float
    ):
        common = dict(bias=bias, rngs=rngs, dtype=dtype, layers=layers)
        self.gate = Linear(width, hidden, ("embed", "mlp"), **common)
        self.up = Linear(width, hidden, ("embed", "mlp"), **common)
        self.down = Linear(hidden, width, ("mlp", "embed"), scale=residual_scale, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class LayerNorm(nnx.Module):
    """Layer norm with learned scale and bias: (D,), or (L, D) stacked."""

    def __init__(self, width: int, *, eps: float, dtype, name: str | None = "embed", layers: int | None = None):
        lead, lead_names = ((), ()) if layers is None else ((layers,), ("layers",))
        self.eps, self.of_residual = eps, name == "embed"
        self.scale = parameter(jnp.ones((*lead, width), dtype), (*lead_names, name))
        self.bias = parameter(jnp.zeros((*lead, width), dtype), (*lead_names, name))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)
        return constrain_whole(y) if self.of_residual else y


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU; not the tanh form."""
    return x * jax.nn.sigmoid(1.702 * x)


class MLP(nnx.Module):
    """`down(activation(up(x)))` with biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        dtype,
        layers: int,
        residual_scale: float,
    ):
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=layers)
        self.activation = activation
        self.up = Linear(width, hidden, ("embed", "mlp"), **common)
        self.down = Linear(hidden, width, ("mlp", "embed"), scale=residual_scale, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))
