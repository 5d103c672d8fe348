"""Root-mean-square norm and layer norm, float32 inside, with explicit gradients.

D model width; `..` stands for any number of leading dims.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops._common import accumulator, require, require_float


def rms_norm(x, scale, *, eps):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dim, computed in float32 and rounded once (Zhang & Sennrich
    2019).

    Args:
      x: (.., D). scale: (D,) of any float dtype. eps: static float.

    Returns:
      (.., D) in x's dtype. The gradient of `scale` is summed in float32.
    """
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    require_float("rms_norm", x=x, scale=scale)
    require(scale.shape == x.shape[-1:], "rms_norm", f"scale has shape {scale.shape}; expected ({x.shape[-1]},)")
    return _rms_norm(x, scale, float(eps))


def rms_norm_forward(x, scale, *, eps):
    """-> y (.., D), rstd (.., 1) in float32."""
    wide = x.astype(accumulator(x.dtype))
    rstd = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * rstd * scale.astype(wide.dtype)).astype(x.dtype), rstd


def rms_norm_backward(g, x, scale, rstd):
    """-> dx in x's dtype, dscale in float32."""
    wide, g = x.astype(rstd.dtype), g.astype(rstd.dtype)
    normed = wide * rstd
    gs = g * scale.astype(rstd.dtype)
    dx = rstd * (gs - normed * jnp.mean(gs * normed, -1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * normed, tuple(range(x.ndim - 1)))


def _statistic(x):
    return jax.ShapeDtypeStruct((*x.shape[:-1], 1), accumulator(x.dtype))


def _gradient(x, statistic, vectors):
    return [x, *[jax.ShapeDtypeStruct(x.shape[-1:], statistic.dtype)] * vectors]


_forward = define_operator(
    "rms_norm",
    reference=rms_norm_forward,
    rule="... d, d -> ... d, ... u",
    replicate=("d", "u"),
    results=lambda x, scale, eps: [x, _statistic(x)],
)
_backward = define_operator(
    "rms_norm_backward",
    reference=rms_norm_backward,
    rule="... d, ... d, d, ... u -> ... d, d",
    reduces={1: ("...",)},
    replicate=("d", "u"),
    results=lambda g, x, scale, rstd: _gradient(x, rstd, 1),
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, eps):
    return _forward(x, scale, eps=eps)[0]


def _rms_norm_fwd(x, scale, eps):
    y, rstd = _forward(x, scale, eps=eps)
    return y, (x, scale, rstd)


def _rms_norm_bwd(eps, res, g):
    x, scale, rstd = res
    dx, dscale = _backward(g, x, scale, rstd)
    return dx, dscale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def layer_norm(x, scale, bias, *, eps):
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last dim, computed in float32 and rounded once (Ba et al.
    2016).

    Args:
      x: (.., D). scale, bias: (D,). eps: static float.

    Returns:
      (.., D) in x's dtype. Gradients of `scale` and `bias` are summed in float32.
    """
    x, scale, bias = jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias)
    require_float("layer_norm", x=x, scale=scale, bias=bias)
    require(
        scale.shape == x.shape[-1:] == bias.shape,
        "layer_norm",
        f"scale has shape {scale.shape} and bias {bias.shape}; expected ({x.shape[-1]},)",
    )
    return _layer_norm(x, scale, bias, float(eps))


def layer_norm_forward(x, scale, bias, *, eps):
    """-> y (.., D), mean and rstd (.., 1) in float32."""
    wide = x.astype(accumulator(x.dtype))
    mean = jnp.mean(wide, -1, keepdims=True)
    centred = wide - mean
    rstd = lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    y = centred * rstd * scale.astype(wide.dtype) + bias.astype(wide.dtype)
    return y.astype(x.dtype), mean, rstd


def layer_norm_backward(g, x, scale, mean, rstd):
    """-> dx in x's dtype, dscale and dbias in float32."""
    wide, g = x.astype(rstd.dtype), g.astype(rstd.dtype)
    normed = (wide - mean) * rstd
    gs = g * scale.astype(rstd.dtype)
    dx = rstd * (gs - jnp.mean(gs, -1, keepdims=True) - normed * jnp.mean(gs * normed, -1, keepdims=True))
    leading = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(g * normed, leading), jnp.sum(g, leading)


_layer_forward = define_operator(
    "layer_norm",
    reference=layer_norm_forward,
    rule="... d, d, d -> ... d, ... u, ... u",
    replicate=("d", "u"),
    results=lambda x, scale, bias, eps: [x, _statistic(x), _statistic(x)],
)
_layer_backward = define_operator(
    "layer_norm_backward",
    reference=layer_norm_backward,
    rule="... d, ... d, d, ... u, ... u -> ... d, d, d",
    reduces={1: ("...",), 2: ("...",)},
    replicate=("d", "u"),
    results=lambda g, x, scale, mean, rstd: _gradient(x, rstd, 2),
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, eps):
    return _layer_forward(x, scale, bias, eps=eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    y, mean, rstd = _layer_forward(x, scale, bias, eps=eps)
    return y, (x, scale, mean, rstd, jnp.zeros((), bias.dtype))


def _layer_norm_bwd(eps, res, g):
    x, scale, mean, rstd, like_bias = res
    dx, dscale, dbias = _layer_backward(g, x, scale, mean, rstd)
    return dx, dscale.astype(scale.dtype), dbias.astype(like_bias.dtype)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)
