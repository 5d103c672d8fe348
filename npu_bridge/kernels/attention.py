"""Attention: the blocked torch equivalent, and npu_fusion_attention.

B rows, I blocks, C query positions of a block, S key positions in its window, N query heads, K key heads, G = N / K, H
and J head dims. `blocks` is (C, left halo, right halo) as planned by npu_bridge.ops, with C = 0 for one block over
everything.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

from npu_bridge.kernels.registry import torch_npu

# ---- torch equivalent -----------------------------------------------------------------------------------------------


def _pad_positions(x, before, after):
    """Pad the positions (dim 1) with zeros before and after."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (before, after)) if before or after else x


def _own(x, size):
    """Split positions into blocks: (B, T, ..) -> (B, I, C, ..)."""
    if not size:
        return x[:, None]
    return _pad_positions(x, 0, -x.shape[1] % size).unflatten(1, (-1, size))


def _reached(x, blocks):
    """Overlapping key windows of the blocks, zeros past the ends of the row: (B, T, ..) -> (B, I, S, ..)."""
    size, left, right = blocks
    if not size:
        return x[:, None]
    padded = _pad_positions(x, left, -x.shape[1] % size + right)
    return padded.unfold(1, left + size + right, size).movedim(-1, 2)


def _sum_reached(x, blocks, positions):
    """Transpose of `_reached`, summing overlaps: (B, I, S, ..) -> (B, T, ..)."""
    size, left, _ = blocks
    if not size:
        return x[:, 0]
    count, reached = x.shape[1:3]
    total = x.new_zeros(x.shape[0], (count - 1) * size + reached, *x.shape[3:])
    # Add one block-long slice of every window at a time: such slices of all windows do not overlap.
    for start in range(0, reached, size):
        part = x[:, :, start : start + size]
        part = F.pad(part, (0, 0) * (x.ndim - 3) + (0, size - part.shape[2])).flatten(1, 2)
        room = min(part.shape[1], total.shape[1] - start)
        total[:, start : start + room] += part[:, :room]
    return total[:, left : left + positions]


def _by_key_head(x, key_heads):
    """Group query heads by key head: (B, I, C, N, H) -> (B, I, K, G * C, H)."""
    return x.unflatten(3, (key_heads, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


def _merge_query_blocks(x, group, positions):
    """Inverse of `_own` and `_by_key_head`: (B, I, K, G * C, H) -> (B, T, N, H)."""
    return x.unflatten(3, (group, -1)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :positions]


def forbidden(q, k, segments, *, causal, window, blocks):
    """Mask (B or 1, I or 1, C, S), True where a query may not attend (torch_npu's convention); None when nothing is
    masked.
    """
    size, left, right = blocks
    queries, keys = q.shape[1], k.shape[1]
    positions, reached, shift = (size, left + size + right, left) if size else (queries, keys, keys - queries)
    ahead = torch.arange(positions, device=q.device)[:, None] + shift - torch.arange(reached, device=q.device)[None]
    mask = None
    if causal or window is not None:
        mask = torch.zeros_like(ahead, dtype=torch.bool)
        if causal:
            mask |= ahead < 0
        if window is not None:
            mask |= ahead >= window
            if not causal:
                mask |= ahead <= -window
        mask = mask[None, None]
    ids_q, ids_kv = segments[:2] or (None, None)
    if size and ids_q is None:
        ids_q = ids_kv = torch.ones(1, queries, dtype=torch.int32, device=q.device)
    if ids_q is not None:
        ids_q, ids_kv = _own(ids_q, size)[..., None], _reached(ids_kv, blocks)[:, :, None]
        apart = (ids_q != ids_kv) | (ids_q == 0)
        mask = apart if mask is None else mask | apart
    return mask


# Logits are in base 2. On a CPU torch.exp calls MKL, which is ten times slower on infinities (every masked position)
# and near underflow; exp2 is not.
_LOG2E, _LN2 = math.log2(math.e), math.log(2)


def _logits(q, k, mask, group, scale):
    """Base-2 logits (B, I, K, G * C, S) in float32; bfloat16 operands accumulate in float32."""
    logits = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale * _LOG2E)
    if mask is not None:
        logits.unflatten(3, (group, -1)).masked_fill_(mask[:, :, None, None], float("-inf"))
    return logits


def _forbidden_or(mask, q, k, segments, **limits):
    """`forbidden`, or the same from an additive mask (B * I, 1, C, S) when one is given."""
    return forbidden(q, k, segments, **limits) if mask is None else (mask[:, 0] != 0).unflatten(0, (q.shape[0], -1))


def attention(q, k, v, *segments, causal, window, scale, blocks, mask=None, wide=False):
    """Forward pass. Returns out (B, T, N, J) and lse (B, N, T) in float32.

    With `wide` out is in float32 too, and lse is -inf in place of 0 for a query that attends nothing.
    """
    key_heads, group, positions = k.shape[2], q.shape[2] // k.shape[2], q.shape[1]
    mask = _forbidden_or(mask, q, k, segments, causal=causal, window=window, blocks=blocks)
    qb = _by_key_head(_own(q, blocks[0]), key_heads)
    kb, vb = (_reached(x, blocks).transpose(2, 3) for x in (k, v))
    logits = _logits(qb, kb, mask, group, scale)
    peak = logits.amax(-1, keepdim=True)
    peak.masked_fill_(peak == float("-inf"), 0)
    weights = logits.sub_(peak).exp2_().to(q.dtype)
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    divisor = torch.where(total > 0, total, 1)
    if wide:
        out = torch.matmul(weights.float(), vb.float()) / divisor
    else:
        out = (torch.matmul(weights, vb).float() / divisor).to(q.dtype)
    lse = peak * _LN2 + divisor.log()
    lse = lse.masked_fill(total == 0, float("-inf")) if wide else lse
    lse = _merge_query_blocks(lse, group, positions)[..., 0].transpose(1, 2)
    return _merge_query_blocks(out, group, positions).contiguous(), lse.contiguous()


def attention_backward(g, q, k, v, out, lse, *segments, causal, window, scale, blocks, mask=None):
    """Backward pass from the saved log-sum-exp. Returns dq, dk, dv."""
    key_heads, group, positions, keys = k.shape[2], q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    mask = _forbidden_or(mask, q, k, segments, causal=causal, window=window, blocks=blocks)

    def per_head(x):
        return _by_key_head(_own(x, blocks[0]), key_heads)

    delta, lse = per_head((g.float() * out.float()).sum(-1, keepdim=True)), per_head(lse.transpose(1, 2)[..., None])
    qb, gb = per_head(q), per_head(g)
    kb, vb = (_reached(x, blocks).transpose(2, 3) for x in (k, v))
    p = _logits(qb, kb, mask, group, scale).sub_(lse * _LOG2E).exp2_().to(q.dtype)
    ds = (torch.matmul(gb.float(), vb.float().transpose(-1, -2)).sub_(delta) * p).mul_(scale).to(q.dtype)
    dq = _merge_query_blocks(torch.matmul(ds, kb), group, positions)
    # Gradients of one key from several query blocks are summed in float32.
    dk, dv = (torch.matmul(a.transpose(-1, -2), b).float().transpose(2, 3) for a, b in ((ds, qb), (p, gb)))
    dk, dv = (_sum_reached(x, blocks, keys).to(q.dtype) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# ---- torch_npu
# --------------------------------------------------------------------------------------------------------

COMPRESSED = 2048  # size of the compressed causal or band mask, whatever the sequence length
MOST_LENGTHS = 1024  # longest list of lengths that variable-length attention takes
STATISTICS = 8  # copies of each softmax statistic that the kernel passes from forward to backward


@functools.cache
def _triangle(device):
    return torch.triu(torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device), 1)


def cumulative_lengths(lengths, positions):
    """Cumulative segment ends of (B, M) run lengths, -1 padded, over all rows concatenated, without leading 0.

    Padding at the end of a row becomes a segment: the kernel needs every position in one.
    """
    ends, end = [], 0
    for row in lengths.tolist():  # on the host: reading a device tensor would synchronise
        used = 0
        for length in row:
            if length > 0:
                used += length
                ends.append(end + used)
        if used > positions:
            raise ValueError(
                f"npu_bridge.kernels: segment lengths {row} add up to {used}, but a row has {positions} positions"
            )
        end += positions
        if used < positions:
            ends.append(end)
    return ends


def cumulative_pairs(lengths, lengths_kv, queries, keys):
    """`cumulative_lengths` of queries and of keys, of the same segments: one without queries or without keys stays in
    both lists, as two equal ends. What is left of both rows is one more segment.
    """
    ends, ends_kv = [], []
    for row, (mine, theirs) in enumerate(zip(lengths.tolist(), lengths_kv.tolist())):
        sizes = [(max(a, 0), max(b, 0)) for a, b in zip(mine, theirs) if a > 0 or b > 0]
        rest = queries - sum(a for a, _ in sizes), keys - sum(b for _, b in sizes)
        if min(rest) < 0:
            raise ValueError(
                f"npu_bridge.kernels: segment lengths {mine}, of keys {theirs}, exceed rows of {queries} and {keys}"
            )
        end, end_kv = row * queries, row * keys
        for a, b in [*sizes, rest] if any(rest) else sizes:
            end, end_kv = end + a, end_kv + b
            ends.append(end)
            ends_kv.append(end_kv)
    return ends, ends_kv


def _without_keys(ids_q, ids_kv, lengths):
    """(B, T) bool: queries of padding, and of segments that have no key. Segments are counted from 1."""
    present = torch.zeros(ids_q.shape[0], lengths.shape[1] + 1, dtype=torch.bool, device=ids_q.device)
    present = present.scatter(1, ids_kv.long(), True)
    return (ids_q == 0) | ~present.gather(1, ids_q.long())


_recorders: list[list[tuple[torch.Tensor, int]]] = []


@contextlib.contextmanager
def recording_lengths():
    """Record the (B, M) run lengths and the row length of each captured call whose lengths can be updated before a
    replay.

    The order is that of the calls, as in torch_npu's own records.
    """
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()


def replay_lengths(lengths, positions):
    """Keywords of `NPUGraph.update` for one captured call; None when the kernel takes no list that long."""
    ends = cumulative_lengths(lengths, positions)
    if len(ends) > MOST_LENGTHS:
        return None
    return dict.fromkeys(_LENGTH_ARGUMENTS, torch.tensor(ends, dtype=torch.int64))


def _npu_arguments(q, k, segments, *, causal, window, padding):
    """Return the layout arguments of npu_fusion_attention, and a (B, T) bool of queries whose output must be zeroed (or
    None).
    """
    unlimited = 2147483647
    banded = dict(
        pre_tockens=window - 1 if window else unlimited, next_tockens=0 if causal or not window else window - 1
    )
    ends = cumulative_lengths(segments[2], q.shape[1]) if len(segments) == 3 else None
    if len(segments) == 4 and not _recorders:  # a captured call could not be told new pairs
        ends, ends_kv = cumulative_pairs(*segments[2:], q.shape[1], k.shape[1])
        if len(ends) <= MOST_LENGTHS:
            arguments = dict(actual_seq_qlen=ends, actual_seq_kvlen=ends_kv, softmax_layout="TND")
            return dict(input_layout="TND", **arguments), _without_keys(*segments[:3])
    limited = causal or window is not None
    if (segments and (ends is None or len(ends) > MOST_LENGTHS)) or (limited and q.shape[1] > k.shape[1]):
        mask = forbidden(q, k, segments, causal=causal, window=window, blocks=(0, 0, 0))
        mask = mask.expand(q.shape[0], -1, -1, -1)  # (B, 1, T, S)
        return dict(input_layout="BSND", atten_mask=mask.contiguous(), sparse_mode=0), mask.all(-1)[:, 0]
    arguments = dict(input_layout="TND" if ends else "BSND")
    if window is not None:
        arguments |= dict(atten_mask=_triangle(q.device), sparse_mode=4, **banded)
    elif causal:
        arguments |= dict(atten_mask=_triangle(q.device), sparse_mode=3)  # aligned at the last query and the last key
    if ends:
        # Without softmax_layout the TND statistics are (N, length) blocks, one for each sequence, in a tensor of shape
        # (T, N).
        arguments |= dict(actual_seq_qlen=ends, actual_seq_kvlen=ends, softmax_layout="TND")
        return arguments, segments[0] == 0 if padding == "zeros" else None
    return arguments, None


def _lay(layout, *tensors):
    return tuple(x.flatten(0, 1) if layout == "TND" else x for x in tensors)


_LENGTH_ARGUMENTS = ("actual_seq_qlen", "actual_seq_kvlen")


def _version(q, arguments, segments):
    """Return ("", arguments), or ("_v3", ...) with lengths as host tensors during capture of a graph whose lengths are
    updated.
    """
    if arguments["input_layout"] == "TND" and _recorders:
        _recorders[-1].append((segments[2], q.shape[1]))
        return "_v3", arguments | {name: torch.tensor(arguments[name], dtype=torch.int64) for name in _LENGTH_ARGUMENTS}
    return "", arguments


def _npu_attention(q, k, v, *segments, causal, window, scale, blocks, padding="zeros", statistics=False, wide=False):
    arguments, dead = _npu_arguments(q, k, segments, causal=causal, window=window, padding=padding)
    suffix, arguments = _version(q, arguments, segments)
    call = getattr(torch_npu(), "npu_fusion_attention" + suffix)
    tnd = arguments["input_layout"] == "TND"
    out, peak, total = call(*_lay(arguments["input_layout"], q, k, v), q.shape[2], scale=scale, **arguments)[:3]
    out = out.reshape(*q.shape[:3], v.shape[-1])
    if dead is not None:
        out = out.masked_fill_(dead[..., None, None], 0)
    if wide:
        out = out.float()
    if statistics:
        if dead is not None and not tnd:  # with TND padding attends itself
            peak, total = peak.masked_fill_(dead[:, None, :, None], 0), total.masked_fill_(dead[:, None, :, None], 1)
        shape = (q.shape[0], q.shape[2], q.shape[1], STATISTICS)
        return out, peak.view(shape), total.view(shape)
    # The kernel repeats each statistic eight times. The log-sum-exp is enough: exp(x - max) / sum = exp(x - lse).
    lse = peak[..., 0] + total[..., 0].log()
    if tnd:
        lse = lse.reshape(*q.shape[:3]).transpose(1, 2).contiguous()
    return out, lse if dead is None else lse.masked_fill_(dead[:, None], float("-inf") if wide else 0)


def _npu_attention_backward(g, q, k, v, out, *rest, causal, window, scale, blocks, padding="zeros", statistics=False):
    segments = rest[2:] if statistics else rest[1:]
    arguments, dead = _npu_arguments(q, k, segments, causal=causal, window=window, padding=padding)
    suffix, arguments = _version(q, arguments, segments)
    layout = arguments["input_layout"]
    if dead is not None:
        g = g.masked_fill(dead[..., None, None], 0)
    if statistics:
        peak, total = (x.view(-1, q.shape[2], STATISTICS) if layout == "TND" else x for x in rest[:2])
    else:
        lse = rest[0]
        if layout == "TND":
            if dead is not None:  # padding is a sequence of its own: its probabilities must become 0, not overflow
                lse = lse.masked_fill(dead[:, None], 1e30)
            lse = lse.transpose(1, 2).reshape(-1, q.shape[2])
        peak = lse[..., None].expand(*lse.shape, STATISTICS).contiguous()
        total = torch.ones_like(peak)
    ql, kl, vl, gl, outl = _lay(layout, q, k, v, g, out.to(q.dtype))
    call = getattr(torch_npu(), "npu_fusion_attention_grad" + suffix)
    dq, dk, dv = call(
        ql,
        kl,
        vl,
        gl,
        q.shape[2],
        softmax_max=peak,
        softmax_sum=total,
        attention_in=outl,
        scale_value=scale,
        **arguments,
    )[:3]
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
