"""Rotary position embedding from ready-made tables (Su et al. 2021), half and interleaved, whole or partial width.

B rows, T tokens, N heads, H head dim, R rotated width (R <= H).
"""

from functools import partial

import jax
import jax.numpy as jnp

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, require, require_float

MODES = ("half", "interleaved")


def rotary(x, cos, sin, *, mode="half"):
    """Rotate the first R entries of each head by the angles of the tables; the rest passes unchanged.

    `half` pairs entry i with i + R/2 (Llama, Qwen), `interleaved` pairs 2i with 2i + 1 (GPT-J, DeepSeek). The tables
    are given
    at full width: entry j of the tables belongs to entry j of the head, so multi-axis tables need no special case.

    Args:
      x: (B, T, N, H). cos, sin: (B, T, R), R even and at most H, best in float32 (bfloat16 tables lose the angle).

    Returns:
      (B, T, N, H) in x's dtype; the rotation is computed in float32. Tables are differentiable.
    """
    x, cos, sin = jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin)
    require_float("rotary", x=x, cos=cos, sin=sin)
    require(mode in MODES, "rotary", f"mode is {mode!r}; expected one of {MODES}")
    require(x.ndim == 4, "rotary", f"x has shape {x.shape}; expected (B, T, N, H)")
    width = cos.shape[-1]
    require(
        cos.shape == sin.shape == (*x.shape[:2], width) and width % 2 == 0 and width <= x.shape[-1],
        "rotary",
        f"cos has shape {cos.shape} and sin {sin.shape}; expected both (B, T, R) = {x.shape[:2]} + (R,) with "
        f"even R <= {x.shape[-1]}",
    )
    return _rotary(x, cos, sin, mode)


def turn(x, mode):
    """Rotate every pair by 90 degrees: (a, b) -> (-b, a)."""
    if mode == "half":
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([-b, a], -1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)


def rotary_forward(x, cos, sin, *, mode):
    """-> y, for tables of shape (B, T, R)."""
    width = cos.shape[-1]
    dtype = accumulator(x.dtype)
    head = x[..., :width].astype(dtype)
    y = (head * cos[:, :, None].astype(dtype) + turn(head, mode) * sin[:, :, None].astype(dtype)).astype(x.dtype)
    return y if width == x.shape[-1] else jnp.concatenate([y, x[..., width:]], -1)


def rotary_backward(g, cos, sin, *, mode):
    """-> dx. The 90-degree rotation is orthogonal and antisymmetric, so its transpose is its negative."""
    width = cos.shape[-1]
    dtype = accumulator(g.dtype)
    head = g[..., :width].astype(dtype)
    dx = (head * cos[:, :, None].astype(dtype) - turn(head * sin[:, :, None].astype(dtype), mode)).astype(g.dtype)
    return dx if width == g.shape[-1] else jnp.concatenate([dx, g[..., width:]], -1)


_RULE = "b t n h, b t r, b t r -> b t n h"


def _like_first(x, cos, sin, mode):
    return [x]


_forward = define_operator("rotary", reference=rotary_forward, rule=_RULE, replicate=("h", "r"), results=_like_first)
_backward = define_operator(
    "rotary_backward", reference=rotary_backward, rule=_RULE, replicate=("h", "r"), results=_like_first
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotary(x, cos, sin, mode):
    return _forward(x, cos, sin, mode=mode)[0]


def _rotary_fwd(x, cos, sin, mode):
    return _forward(x, cos, sin, mode=mode)[0], (x, cos, sin)


def _rotary_bwd(mode, res, g):
    x, cos, sin = res
    # Gradients of the tables are plain JAX outside the operator: training does not use them and XLA removes them.
    width, dtype = cos.shape[-1], accumulator(x.dtype)
    head, gh = x[..., :width].astype(dtype), g[..., :width].astype(dtype)
    dcos = jnp.sum(gh * head, 2).astype(cos.dtype)
    dsin = jnp.sum(gh * turn(head, mode), 2).astype(sin.dtype)
    return _backward(g, cos, sin, mode=mode)[0], dcos, dsin


_rotary.defvjp(_rotary_fwd, _rotary_bwd)
