"""Dense layer with float32 accumulation and explicit gradients.

B rows, T tokens, D model width, F feed-forward (output) width. `..` stands for any number of leading dims.
"""

import jax
import jax.numpy as jnp

from npu_bridge.ops._common import accumulator, dot, require, require_float, sum_over_rows


def linear(x, w, bias=None):
    """`x @ w (+ bias)` in the dtype of x, accumulated in float32.

    Args:
      x: (.., D) activations.
      w: (D, F) weights; cast to x's dtype for the product. Its gradient is accumulated in float32 and returned in w's own
        dtype, so float32 master weights may be passed with bfloat16 activations and lose nothing.
      bias: (F,) or None, added in float32 before the result is cast.

    Returns:
      (.., F) in x's dtype.

    Raises:
      ValueError: shapes that do not fit. TypeError: an integer operand.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    require_float("linear", x=x, w=w)
    require(w.ndim == 2 and x.ndim >= 1 and x.shape[-1] == w.shape[0], "linear",
            f"x has shape {x.shape} and w {w.shape}; expected (.., D) and (D, F) with the same D")
    if bias is None:
        return _linear(x, w)
    require(bias.shape == (w.shape[1],), "linear", f"bias has shape {bias.shape}; expected ({w.shape[1]},)")
    return _linear_bias(x, w, bias)


def _product(x, w):
    return dot(x, w.astype(x.dtype), ((x.ndim - 1,), (0,)))


@jax.custom_vjp
def _linear(x, w):
    return _product(x, w).astype(x.dtype)


def _gradients(x, w, g):
    g = g.astype(x.dtype)
    dx = dot(g, w.astype(x.dtype), ((g.ndim - 1,), (1,))).astype(x.dtype)
    return dx, sum_over_rows(x, g).astype(w.dtype)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), lambda res, g: _gradients(*res, g))


@jax.custom_vjp
def _linear_bias(x, w, bias):
    y = _product(x, w)
    return (y + bias.astype(y.dtype)).astype(x.dtype)


def _linear_bias_backward(res, g):
    x, w, bias = res
    dbias = jnp.sum(g.astype(accumulator(g.dtype)), tuple(range(g.ndim - 1))).astype(bias.dtype)
    return (*_gradients(x, w, g), dbias)


_linear_bias.defvjp(lambda x, w, bias: (_linear_bias(x, w, bias), (x, w, bias)), _linear_bias_backward)
