"""Attention on a CPU by torch's fused kernels, whose logits stay in cache, forward and backward.

The operators behind `scaled_dot_product_attention` are called directly, because they take and return the log-sum-exp
that our forward saves for the backward. Shapes as in attention.py; blocks of queries become rows of the batch.
"""

from __future__ import annotations

import torch

from npu_bridge.kernels.attention import _own, _reached, _sum_reached, attention, attention_backward, forbidden

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _fits(q, v):
    return (
        _FORWARD is not None
        and _BACKWARD is not None
        and q.shape[-1] == v.shape[-1]
        and q.dtype in (torch.float32, torch.bfloat16)
    )


def _lay(x):
    """Reshape (B, I, C, N, H) to (B * I, N, C, H); a view if there is one block."""
    return x.flatten(0, 1).transpose(1, 2)


def _join(x, batch, positions):
    """Inverse of `_lay`: (B * I, N, C, H) -> (B, T, N, H)."""
    return x.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :positions].contiguous()


def _mask(q, k, segments, given, *, causal, window, blocks):
    """Additive mask (B * I, 1, C, S), or None. Returns `mask` itself if given."""
    if given is not None:
        return given
    mask = forbidden(q, k, segments, causal=causal, window=window, blocks=blocks)
    if mask is None:
        return None
    added = torch.where(mask, float("-inf"), 0.0).to(q.dtype)
    rows = q.shape[0], -(-q.shape[1] // blocks[0]) if blocks[0] else 1
    return added.expand(*rows, -1, -1).flatten(0, 1)[:, None]


def _operands(q, k, v, blocks):
    return _lay(_own(q, blocks[0])), _lay(_reached(k, blocks)), _lay(_reached(v, blocks))


def flash(q, k, v, *segments, causal, window, scale, blocks, mask=None, wide=False):
    """Forward pass.

    Returns out (B, T, N, J) and lse (B, N, T) in float32. `mask`: (B * I, 1, C, S), if computed before. `wide`: out in
    float32, and lse -inf in place of 0 for a query that attends nothing.
    """
    if not _fits(q, v):
        return attention(
            q, k, v, *segments, causal=causal, window=window, scale=scale, blocks=blocks, mask=mask, wide=wide
        )
    batch, positions = q.shape[:2]
    if wide:
        q, k, v, mask = q.float(), k.float(), v.float(), None if mask is None else mask.float()
    mask = _mask(q, k, segments, mask, causal=causal, window=window, blocks=blocks)
    out, lse = _FORWARD(*_operands(q, k, v, blocks), 0.0, False, attn_mask=mask, scale=scale)
    if wide and mask is not None:
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return _join(out, batch, positions), _join(lse[..., None], batch, positions)[..., 0].transpose(1, 2).contiguous()


def flash_backward(g, q, k, v, out, lse, *segments, causal, window, scale, blocks, mask=None):
    """Backward pass from the saved log-sum-exp. Returns dq, dk, dv."""
    if not _fits(q, v):
        return attention_backward(
            g, q, k, v, out, lse, *segments, causal=causal, window=window, scale=scale, blocks=blocks, mask=mask
        )
    batch, positions, keys, dtype = q.shape[0], q.shape[1], k.shape[1], q.dtype
    # In float32: with bfloat16 inputs torch's kernel accumulates dk and dv in bfloat16 over query blocks and the heads
    # of a group.
    # With eight heads a group and 512 positions the error is 1e-2; rounded once at the end, 1.7e-3.
    g, q, k, v, out = (x.float() for x in (g, q, k, v, out))
    mask = _mask(q, k, segments, None if mask is None else mask.float(), causal=causal, window=window, blocks=blocks)

    def per_block(x):
        return _lay(_own(x, blocks[0]))

    statistics = per_block(lse.transpose(1, 2)[..., None])[..., 0].contiguous()
    dq, dk, dv = _BACKWARD(
        per_block(g), *_operands(q, k, v, blocks), per_block(out), statistics, 0.0, False, attn_mask=mask, scale=scale
    )
    dk, dv = (_sum_reached(x.transpose(1, 2).unflatten(0, (batch, -1)), blocks, keys) for x in (dk, dv))
    return _join(dq, batch, positions).to(dtype), dk.to(dtype).contiguous(), dv.to(dtype).contiguous()
