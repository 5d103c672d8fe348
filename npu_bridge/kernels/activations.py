"""Rotary embedding, SwiGLU, GELU. B rows, T tokens, N heads, H head dim, R rotated width, F feed-forward width."""

from __future__ import annotations

import math

import torch

from npu_bridge.kernels.registry import register, torch_npu

_MODES = {"half": "half", "interleaved": "interleave"}  # our word -> torch_npu's


def _turn(x, mode):
    """(a, b) -> (-b, a) in every pair."""
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def _swap(x, mode):
    """(a, b) -> (b, a) in every pair."""
    if mode == "half":
        return torch.cat(x.chunk(2, -1)[::-1], -1)
    return torch.stack((x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def _rotated_part(x, cos, rotate):
    width = cos.shape[-1]
    y = rotate(x if width == x.shape[-1] else x[..., :width])
    return (y if width == x.shape[-1] else torch.cat((y, x[..., width:]), -1),)


def _npu_rotate(x, cos, sin, mode):
    # One dtype for all three operands; float32, because bfloat16 tables lose the angle at long positions.
    y = torch_npu().npu_rotary_mul(x.float().contiguous(), cos.float()[:, :, None], sin.float()[:, :, None], _MODES[mode])
    return y.to(x.dtype)


def _npu_rotary(x, cos, sin, *, mode):
    return _rotated_part(x, cos, lambda head: _npu_rotate(head, cos, sin, mode))


def _npu_rotary_backward(g, cos, sin, *, mode):
    # The transpose of a rotation is the rotation the other way, its sines exchanged inside each pair.
    return _rotated_part(g, cos, lambda head: _npu_rotate(head, cos, -_swap(sin, mode), mode))


@register(
    "rotary",
    family="rotary",
    call='torch_npu.npu_rotary_mul(x, cos, sin, "half" | "interleave")',
    npu=_npu_rotary,
    note="layout BSND, tables (B, T, 1, R), float32 inside; partial width by slice and concatenation",
)
def rotary(x, cos, sin, *, mode):
    return _rotated_part(
        x, cos, lambda head: (head.float() * cos.float()[:, :, None] + _turn(head.float(), mode) * sin.float()[:, :, None]).to(x.dtype)
    )


@register(
    "rotary_backward",
    family="rotary",
    call='torch_npu.npu_rotary_mul(g, cos, -swap(sin), "half" | "interleave")',
    npu=_npu_rotary_backward,
    note="npu_rotary_mul_backward would also compute table gradients that nobody wants",
)
def rotary_backward(g, cos, sin, *, mode):
    return _rotated_part(
        g, cos, lambda head: (head.float() * cos.float()[:, :, None] - _turn(head.float() * sin.float()[:, :, None], mode)).to(g.dtype)
    )


def _npu_swiglu(gate, up):
    return (torch_npu().npu_swiglu(torch.cat((gate, up), -1), dim=-1),)


def _npu_swiglu_backward(g, gate, up):
    both = torch_npu().npu_swiglu_backward(g, torch.cat((gate, up), -1), dim=-1)
    return tuple(part.contiguous() for part in both.chunk(2, -1))


@register("swiglu", family="swiglu", call="torch_npu.npu_swiglu(cat(gate, up), dim=-1)", npu=_npu_swiglu, note="gate first")
def swiglu(gate, up):
    wide = gate.float()
    return ((wide * torch.sigmoid(wide) * up.float()).to(gate.dtype),)


@register("swiglu_backward", family="swiglu", call="torch_npu.npu_swiglu_backward(g, cat(gate, up), dim=-1)", npu=_npu_swiglu_backward)
def swiglu_backward(g, gate, up):
    g, wide = g.float(), gate.float()
    sigmoid = torch.sigmoid(wide)
    dgate = g * up.float() * sigmoid * (1 + wide * (1 - sigmoid))
    return dgate.to(gate.dtype), (g * wide * sigmoid).to(up.dtype)


def _approximation(approximate):
    return "tanh" if approximate else "none"


def _npu_gelu(x, *, approximate):
    return (torch_npu().npu_gelu(x, approximate=_approximation(approximate)),)


def _npu_gelu_backward(g, x, *, approximate):
    return (torch_npu().npu_gelu_backward(g, x, approximate=_approximation(approximate)),)


_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@register(
    "gelu",
    family="gelu",
    call='torch_npu.npu_gelu(x, approximate="tanh" | "none")',
    npu=_npu_gelu,
    note="fast_gelu is a legacy operator and another formula",
)
def gelu(x, *, approximate):
    wide = x.float()
    if approximate:
        return ((0.5 * wide * (1 + torch.tanh(_SLOPE * (wide + _CUBIC * wide**3)))).to(x.dtype),)
    return ((0.5 * wide * (1 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype),)


@register("gelu_backward", family="gelu", call='torch_npu.npu_gelu_backward(g, x, approximate="tanh" | "none")', npu=_npu_gelu_backward)
def gelu_backward(g, x, *, approximate):
    wide = x.float()
    if approximate:
        t = torch.tanh(_SLOPE * (wide + _CUBIC * wide**3))
        slope = 0.5 * (1 + t) + 0.5 * wide * (1 - t * t) * _SLOPE * (1 + 3 * _CUBIC * wide * wide)
    else:
        slope = 0.5 * (1 + torch.erf(wide * math.sqrt(0.5))) + wide * torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((g.float() * slope).to(x.dtype),)
