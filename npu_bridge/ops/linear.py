"""Dense layer with float32 accumulation and explicit gradients.

B rows, T tokens, D model width, F feed-forward (output) width. `..` stands for any number of leading dims.
"""

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.jaxcompat import chosen_function
from npu_bridge.ops._common import accumulator, dot, require, require_float, sum_over_rows
from npu_bridge.ops._platform import platform_function


def linear(x, w, bias=None):
    """`x @ w (+ bias)` in the dtype of x, accumulated in float32.

    Args:
      x: (.., D) activations.
      w: (D, F) weights; cast to x's dtype for the product. Its gradient is accumulated in float32 and returned in w's
        own dtype, so float32 master weights may be passed with bfloat16 activations and lose nothing.
      bias: (F,) or None, added in float32 before the result is cast.

    Returns:
      (.., F) in x's dtype.

    Raises:
      ValueError: shapes that do not fit. TypeError: an integer operand.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    require_float("linear", x=x, w=w)
    require(
        w.ndim == 2 and x.ndim >= 1 and x.shape[-1] == w.shape[0],
        "linear",
        f"x has shape {x.shape} and w {w.shape}; expected (.., D) and (D, F) with the same D",
    )
    if bias is None:
        return _linear(x, w)
    require(bias.shape == (w.shape[1],), "linear", f"bias has shape {bias.shape}; expected ({w.shape[1]},)")
    return _linear_bias(x, w, bias)


def _wide(x, w, *bias, contract):
    y = dot(x, w, contract)
    return (y + bias[0].astype(y.dtype) if bias else y).astype(x.dtype)


def _narrow(x, w, *bias, contract):
    y = lax.dot_general(x, w, (contract, ((), ())))
    return y + bias[0].astype(y.dtype) if bias else y


# On the NPU the product is asked for in the operands' dtype at once: the matrix unit accumulates in float32 whatever it
# returns, while for a float32 result of bfloat16 operands torch would have to widen the operands first.
_rounded_product = platform_function("npu_bridge.linear", _wide, _narrow)


@jax.custom_vjp
def _linear(x, w):
    return _rounded_product(x, w.astype(x.dtype), contract=((x.ndim - 1,), (0,)))


def _rows_apart(x, g):
    return (sum_over_rows(x, g, apart=True),)


def _rows_together(x, g):
    return (sum_over_rows(x, g),)


_weight_product = chosen_function(
    "npu_bridge.linear_weight_gradient",
    _rows_apart,
    lambda platform, local, *avals: _rows_together if local else _rows_apart,
    results=lambda x, g: [jax.ShapeDtypeStruct((x.shape[-1], g.shape[-1]), accumulator(x.dtype))],
)


def _gradients(x, w, g):
    g = g.astype(x.dtype)
    dx = _rounded_product(g, w.astype(x.dtype), contract=((g.ndim - 1,), (1,)))
    return dx, _weight_product(x, g)[0].astype(w.dtype)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), lambda res, g: _gradients(*res, g))


@jax.custom_vjp
def _linear_bias(x, w, bias):
    return _rounded_product(x, w.astype(x.dtype), bias, contract=((x.ndim - 1,), (0,)))


def _linear_bias_backward(res, g):
    x, w, bias = res
    dbias = jnp.sum(g.astype(accumulator(g.dtype)), tuple(range(g.ndim - 1))).astype(bias.dtype)
    return (*_gradients(x, w, g), dbias)


_linear_bias.defvjp(lambda x, w, bias: (_linear_bias(x, w, bias), (x, w, bias)), _linear_bias_backward)
