"""Register the three implementations of attention: equivalent, fused on a CPU, fused on an NPU."""

from __future__ import annotations

import functools

import torch

from npu_bridge.kernels.attention import (
    STATISTICS,
    _npu_attention,
    _npu_attention_backward,
    attention,
    attention_backward,
)
from npu_bridge.kernels.attention_cpu import flash, flash_backward
from npu_bridge.kernels.registry import register


def _handing_over(forward):
    """Adapt `forward` to the table's parameters.

    `padding` is ignored: outputs at padding are zero anyway. With `statistics` return the largest logit and the sum of
    exponentials, (B, N, T, 8) float32 each, in place of the log-sum-exp. With `masked` the last operand is an additive
    mask.
    """

    @functools.wraps(forward)
    def run(q, k, v, *segments, padding="zeros", statistics=False, masked=False, **params):
        if masked:
            *segments, params["mask"] = segments
        out, lse = forward(q, k, v, *segments, **params)
        if not statistics:
            return out, lse
        peak = lse[..., None].expand(*lse.shape, STATISTICS).contiguous()
        return out, peak, torch.ones_like(peak)

    return run


def _taking_over(backward):
    """Adapt the backward pass to the same parameters as `_handing_over`."""

    @functools.wraps(backward)
    def run(g, q, k, v, out, *rest, padding="zeros", statistics=False, masked=False, **params):
        if masked:
            *rest, params["mask"] = rest
        if statistics:
            rest = (rest[0][..., 0] + rest[1][..., 0].log(), *rest[2:])
        return backward(g, q, k, v, out, *rest, **params)

    return run


_FORMS = {  # suffix -> (arguments, note)
    "": (
        '"BSND", sparse_mode=3 | 4 with the 2048 triangle, or no mask',
        "mask True = masked; sparse mode 3 is causal from the lower right, 4 a band",
    ),
    "_segments": (
        '"BSND", atten_mask=(B, 1, T, S), sparse_mode=0',
        "a materialised mask: the fall-back where no lengths are given",
    ),
    "_packed": (
        '"TND", actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=0 | 3 | 4',
        "ends: cumulative, host, no leading 0, at most 1024; v3 inside a captured graph, which is told new "
        "ends before each replay",
    ),
    "_ring": (
        '"TND", actual_seq_qlen=ends, actual_seq_kvlen=ends_kv, sparse_mode=0',
        "one round of a ring: ends of queries and keys apart, equal ends where a segment has none; a "
        "materialised mask inside a captured graph",
    ),
}

for _suffix, (_arguments, _note) in _FORMS.items():
    _call = f"torch_npu.npu_fusion_attention(q, k, v, N, {_arguments})"
    register(
        "attention" + _suffix,
        family="attention",
        call=_call,
        npu=_npu_attention,
        cpu=_handing_over(flash),
        inside=True,
        note=_note,
    )(_handing_over(attention))
    _call = (
        f"torch_npu.npu_fusion_attention_grad(q, k, v, g, N, {_arguments}, softmax_max=max, softmax_sum=sum, "
        "attention_in=out)"
    )
    register(
        f"attention{_suffix}_backward",
        family="attention",
        call=_call,
        npu=_npu_attention_backward,
        cpu=_taking_over(flash_backward),
        inside=True,
    )(_taking_over(attention_backward))
