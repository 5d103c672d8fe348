"""Rotary embedding, SwiGLU, GELU. B rows, T tokens, N heads, H head dim, R rotated width, F feed-forward width."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from npu_bridge.kernels.registry import register, torch_npu

_MODES = {"half": "half", "interleaved": "interleave"}  # our name -> torch_npu's


def _pairs(x, mode):
    """Views of the first and the second member of each rotated pair."""
    return x.chunk(2, -1) if mode == "half" else (x[..., 0::2], x[..., 1::2])


def _rotate(x, cos, sin, mode):
    """Map each pair (a, b) to (a cos - b sin, b cos + a sin). The two members may have different angles."""
    x, cos, sin = x.float(), cos.float()[:, :, None], sin.float()[:, :, None]
    y = x * cos
    (a, b), (first, second), (ya, yb) = _pairs(x, mode), _pairs(sin, mode), _pairs(y, mode)
    ya.addcmul_(b, first, value=-1)
    yb.addcmul_(a, second)
    return y


def _rotate_back(g, cos, sin, mode):
    """The transpose of `_rotate`."""
    g, cos, sin = g.float(), cos.float()[:, :, None], sin.float()[:, :, None]
    y = g * cos
    (a, b), (first, second), (ya, yb) = _pairs(g, mode), _pairs(sin, mode), _pairs(y, mode)
    ya.addcmul_(b, second)
    yb.addcmul_(a, first, value=-1)
    return y


def _swap(x, mode):
    """Exchange the members of each pair."""
    if mode == "half":
        return torch.cat(x.chunk(2, -1)[::-1], -1)
    return torch.stack((x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def _rotated_part(x, cos, rotate):
    width = cos.shape[-1]
    y = rotate(x if width == x.shape[-1] else x[..., :width])
    return (y if width == x.shape[-1] else torch.cat((y, x[..., width:]), -1),)


def _npu_rotate(x, cos, sin, mode):
    # One dtype for all three operands; float32, because bfloat16 tables lose the angle at long positions.
    y = torch_npu().npu_rotary_mul(
        x.float().contiguous(), cos.float()[:, :, None], sin.float()[:, :, None], _MODES[mode]
    )
    return y.to(x.dtype)


def _npu_rotary(x, cos, sin, *, mode):
    return _rotated_part(x, cos, lambda head: _npu_rotate(head, cos, sin, mode))


def _npu_rotary_backward(g, cos, sin, *, mode):
    # The transpose of a rotation is its inverse; the sines are exchanged inside each pair.
    return _rotated_part(g, cos, lambda head: _npu_rotate(head, cos, -_swap(sin, mode), mode))


@register(
    "rotary",
    family="rotary",
    call='torch_npu.npu_rotary_mul(x, cos, sin, "half" | "interleave")',
    npu=_npu_rotary,
    note="layout BSND, tables (B, T, 1, R), float32 inside; partial width by slice and concatenation",
)
def rotary(x, cos, sin, *, mode):
    return _rotated_part(x, cos, lambda head: _rotate(head, cos, sin, mode).to(x.dtype))


@register(
    "rotary_backward",
    family="rotary",
    call='torch_npu.npu_rotary_mul(g, cos, -swap(sin), "half" | "interleave")',
    npu=_npu_rotary_backward,
    note="npu_rotary_mul_backward would also compute table gradients that nobody wants",
)
def rotary_backward(g, cos, sin, *, mode):
    return _rotated_part(g, cos, lambda head: _rotate_back(head, cos, sin, mode).to(g.dtype))


def _npu_swiglu(gate, up):
    return _npu_swiglu_concatenated(torch.cat((gate, up), -1))


def _npu_swiglu_backward(g, gate, up):
    return _npu_swiglu_concatenated_backward(g, torch.cat((gate, up), -1))[0].chunk(2, -1)


def _npu_swiglu_concatenated(both):
    return (torch_npu().npu_swiglu(both, dim=-1),)


def _npu_swiglu_concatenated_backward(g, both):
    return (torch_npu().npu_swiglu_backward(g, both, dim=-1),)


@register(
    "swiglu", family="swiglu", call="torch_npu.npu_swiglu(cat(gate, up), dim=-1)", npu=_npu_swiglu, note="gate first"
)
def swiglu(gate, up):
    return (F.silu(gate.float()).mul_(up.float()).to(gate.dtype),)


@register(
    "swiglu_backward",
    family="swiglu",
    call="torch_npu.npu_swiglu_backward(g, cat(gate, up), dim=-1)",
    npu=_npu_swiglu_backward,
)
def swiglu_backward(g, gate, up):
    g, wide = g.float(), gate.float()
    dgate = torch.ops.aten.silu_backward(g * up.float(), wide)
    return dgate.to(gate.dtype), F.silu(wide).mul_(g).to(up.dtype)


@register(
    "swiglu_concatenated",
    family="swiglu",
    call="torch_npu.npu_swiglu(both, dim=-1)",
    npu=_npu_swiglu_concatenated,
    note="both: gate and up side by side; on npu a pass writes it for `swiglu`, so that forward and backward "
    "share one concatenation",
)
def swiglu_concatenated(both):
    return swiglu(*both.chunk(2, -1))


@register(
    "swiglu_concatenated_backward",
    family="swiglu",
    call="torch_npu.npu_swiglu_backward(g, both, dim=-1)",
    npu=_npu_swiglu_concatenated_backward,
)
def swiglu_concatenated_backward(g, both):
    return (torch.cat(swiglu_backward(g, *both.chunk(2, -1)), -1),)


def _approximation(approximate):
    return "tanh" if approximate else "none"


def _npu_gelu(x, *, approximate):
    return (torch_npu().npu_gelu(x, approximate=_approximation(approximate)),)


def _npu_gelu_backward(g, x, *, approximate):
    return (torch_npu().npu_gelu_backward(g, x, approximate=_approximation(approximate)),)


@register(
    "gelu",
    family="gelu",
    call='torch_npu.npu_gelu(x, approximate="tanh" | "none")',
    npu=_npu_gelu,
    note="fast_gelu is a legacy operator and another formula",
)
def gelu(x, *, approximate):
    return (F.gelu(x.float(), approximate=_approximation(approximate)).to(x.dtype),)


@register(
    "gelu_backward",
    family="gelu",
    call='torch_npu.npu_gelu_backward(g, x, approximate="tanh" | "none")',
    npu=_npu_gelu_backward,
)
def gelu_backward(g, x, *, approximate):
    return (torch.ops.aten.gelu_backward(g.float(), x.float(), approximate=_approximation(approximate)).to(x.dtype),)
