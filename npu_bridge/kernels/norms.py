"""Norms. `..` leading dims, D model width."""

from __future__ import annotations

import torch

from npu_bridge.kernels.registry import register, torch_npu


def _leading(x):
    return tuple(range(x.ndim - 1))


def _npu_rms_norm(x, scale, *, eps):
    return tuple(torch_npu().npu_rms_norm(x, scale, epsilon=eps))


def _npu_rms_norm_backward(g, x, scale, rstd):
    dx, dscale = torch_npu().npu_rms_norm_backward(g, x, scale, rstd)
    return dx, dscale.float()  # the kernel returns float32 whatever the scale's dtype; the cast is free otherwise


@register(
    "rms_norm",
    family="rms_norm",
    call="torch_npu.npu_rms_norm(x, scale, epsilon=eps)",
    npu=_npu_rms_norm,
    note="returns rstd (.., 1) float32 as well; scale may be float32 beside bfloat16 x",
)
def rms_norm(x, scale, *, eps):
    wide = x.float()
    # vector_norm reads the row once; its square over D is the mean of squares.
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(scale.float()).to(x.dtype), rstd


@register(
    "rms_norm_backward",
    family="rms_norm",
    call="torch_npu.npu_rms_norm_backward(g, x, scale, rstd)",
    npu=_npu_rms_norm_backward,
    note="dscale is float32 whatever the scale's dtype",
)
def rms_norm_backward(g, x, scale, rstd):
    g, normed, scale = g.float(), x.float() * rstd, scale.float()
    terms = g * normed
    mean = (terms @ scale).div_(x.shape[-1])[..., None]
    dx = (g * scale).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), terms.sum(_leading(x))


def _npu_layer_norm(x, scale, bias, *, eps):
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale.float(), bias.float(), eps)
    return y, mean.float(), rstd.float()


def _npu_layer_norm_backward(g, x, scale, mean, rstd):
    # In float32: with bfloat16 operands a kernel may accumulate dscale and dbias over rows in bfloat16, whatever dtype
    # it returns.
    # torch's CPU kernel does: sums over 51 rows are off by 1.0e-2, bit for bit a bfloat16 accumulator's. Each addition
    # rounds by up to 2^-9 of the running sum, so the error grows with the batch; one rounding of a float32 sum does
    # not.
    scale = scale.float()
    dx, dscale, dbias = torch.ops.aten.native_layer_norm_backward(
        g.float(), x.float(), x.shape[-1:], mean, rstd, scale, torch.zeros_like(scale), [True] * 3
    )
    return dx.to(x.dtype), dscale, dbias


@register(
    "layer_norm",
    family="layer_norm",
    call="torch.native_layer_norm(x, (D,), scale.float(), bias.float(), eps)",
    npu=_npu_layer_norm,
    note="aclnnLayerNorm; npu_layer_norm_eval is a legacy operator and is avoided",
)
def layer_norm(x, scale, bias, *, eps):
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * scale.float() + bias.float()).to(x.dtype), mean, rstd


@register(
    "layer_norm_backward",
    family="layer_norm",
    call="aten.native_layer_norm_backward(g.float(), x.float(), (D,), mean, rstd, scale.float(), bias, [True] * 3)",
    npu=_npu_layer_norm_backward,
    note="aclnnLayerNormBackward, in float32 so that dscale and dbias are summed in it; the bias tensor only says "
    "that a gradient is wanted",
)
def layer_norm_backward(g, x, scale, mean, rstd):
    g, normed = g.float(), (x.float() - mean) * rstd
    gs = g * scale.float()
    dx = rstd * (gs - gs.mean(-1, keepdim=True) - normed * (gs * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * normed).sum(_leading(x)), g.sum(_leading(x))
