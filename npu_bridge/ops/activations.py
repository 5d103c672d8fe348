"""SwiGLU and GELU, float32 inside, with explicit gradients that keep only the inputs.

F feed-forward width; `..` stands for any number of leading dims.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, require, require_float


def swiglu(gate, up):
    """`silu(gate) * up` (Shazeer 2020).

    Args:
      gate, up: (.., F) of one shape and dtype.

    Returns:
      (.., F) in gate's dtype.
    """
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    require_float("swiglu", gate=gate, up=up)
    require(
        gate.shape == up.shape and gate.dtype == up.dtype,
        "swiglu",
        f"gate is {gate.dtype}{gate.shape} and up {up.dtype}{up.shape}; expected one shape and dtype",
    )
    return _swiglu(gate, up)


def swiglu_forward(gate, up):
    """-> y."""
    wide = gate.astype(accumulator(gate.dtype))
    return (wide * jax.nn.sigmoid(wide) * up.astype(wide.dtype)).astype(gate.dtype)


def swiglu_backward(g, gate, up):
    """-> dgate, dup."""
    wide = gate.astype(accumulator(gate.dtype))
    g, up_wide = g.astype(wide.dtype), up.astype(wide.dtype)
    sigmoid = jax.nn.sigmoid(wide)
    dgate = g * up_wide * sigmoid * (1 + wide * (1 - sigmoid))
    return dgate.astype(gate.dtype), (g * wide * sigmoid).astype(up.dtype)


_swiglu_operator = define_operator(
    "swiglu", reference=swiglu_forward, rule="..., ... -> ...", results=lambda gate, up: [gate]
)
_swiglu_gradient = define_operator(
    "swiglu_backward",
    reference=swiglu_backward,
    rule="..., ..., ... -> ..., ...",
    results=lambda g, gate, up: [gate, up],
)


@jax.custom_vjp
def _swiglu(gate, up):
    return _swiglu_operator(gate, up)[0]


_swiglu.defvjp(lambda gate, up: (_swiglu_operator(gate, up)[0], (gate, up)), lambda res, g: _swiglu_gradient(g, *res))


def gelu(x, *, approximate: bool):
    """Gaussian error linear unit (Hendrycks & Gimpel 2016): tanh form when `approximate`, else the exact erf form.

    Args:
      x: any shape. approximate: static, without a default because checkpoints differ in it.

    Returns:
      same shape and dtype as x, computed in float32.
    """
    x = jnp.asarray(x)
    require_float("gelu", x=x)
    return _gelu(x, bool(approximate))


_TANH_SLOPE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715


def gelu_forward(x, *, approximate):
    """-> y."""
    wide = x.astype(accumulator(x.dtype))
    if approximate:
        y = 0.5 * wide * (1 + jnp.tanh(_TANH_SLOPE * (wide + _TANH_CUBIC * wide**3)))
    else:
        y = 0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))
    return y.astype(x.dtype)


def gelu_backward(g, x, *, approximate):
    """-> dx."""
    wide = x.astype(accumulator(x.dtype))
    if approximate:
        t = jnp.tanh(_TANH_SLOPE * (wide + _TANH_CUBIC * wide**3))
        slope = 0.5 * (1 + t) + 0.5 * wide * (1 - t * t) * _TANH_SLOPE * (1 + 3 * _TANH_CUBIC * wide * wide)
    else:
        slope = 0.5 * (1 + lax.erf(wide * math.sqrt(0.5))) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (g.astype(wide.dtype) * slope).astype(x.dtype)


_gelu_operator = define_operator("gelu", reference=gelu_forward, rule="... -> ...", results=lambda x, approximate: [x])
_gelu_gradient = define_operator(
    "gelu_backward", reference=gelu_backward, rule="..., ... -> ...", results=lambda g, x, approximate: [x]
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(x, approximate):
    return _gelu_operator(x, approximate=approximate)[0]


_gelu.defvjp(
    lambda x, approximate: (_gelu_operator(x, approximate=approximate)[0], x),
    lambda approximate, x, g: _gelu_gradient(g, x, approximate=approximate),
)
