"""Reference attention in blocks of queries, each over the contiguous range of keys that it can reach.

B rows, I blocks, C query positions of a block, S key positions of a block (its own and the halo on both sides), N query
heads, K key heads, G = N / K, H and J head dims. Dense attention is the case of one block that reaches everything.

Why blocks: on packed rows of short segments and on 64-patch windows nearly all of T x S is masked, and the exponential
of masked logits costs as much as any other (on a CPU more than the products do).
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from npu_bridge.ops._common import accumulator, einsum, require, sum_over_rows


class Plan(NamedTuple):
    """Static shape of the computation: query blocks of `size` reach `left` keys before and `right` keys behind their
    own.
    """

    causal: bool
    window: int | None
    size: int  # 0: one block over everything
    left: int
    right: int


def plan_blocks(queries, keys, *, causal, window, max_segment_length, implementation=None):
    """Return the cheapest plan that the static promises allow.

    Raises:
      ValueError: "banded" without a promise that bounds the band, or with unequal numbers of queries and keys.
    """
    dense = Plan(causal, window, 0, 0, 0)
    require(
        implementation in (None, "dense", "banded"),
        "attention",
        f"implementation is {implementation!r}; expected None, 'dense' or 'banded'",
    )
    reach = min((value for value in (window, max_segment_length) if value is not None), default=None)
    possible = reach is not None and queries == keys
    require(
        possible or implementation != "banded",
        "attention",
        f"'banded' needs max_segment_length or window, and as many queries as keys (here {queries} and {keys})",
    )
    if not possible or implementation == "dense":
        return dense
    left = -(-(reach - 1) // 16) * 16
    right = 0 if causal else left
    # A block costs C * (C + halo) logits and copies C + halo keys; measured, a copied key costs as much as about 32
    # logits.
    size = max(64, min(512, 1 << round(math.log2(math.sqrt(32 * max(left + right, 1))))))
    blocks = -(-queries // size)
    worthwhile = blocks * size * (size + left + right) < 0.8 * queries * keys
    return Plan(causal, window, size, left, right) if worthwhile or implementation == "banded" else dense


def allowed(plan, queries, keys, ids_q, ids_kv):
    """(B or 1, I or 1, C, S) bool, True where a query may attend a key; None when nothing is forbidden."""
    if plan.size:
        positions, shift, pieces = plan.size, plan.left, _pieces(plan)
    else:
        # Two halves, for the sake of the concatenation below.
        positions, shift, pieces = queries, keys - queries, [(0, keys // 2), (keys // 2, keys - keys // 2)]
    if plan.size and ids_q is None:  # the halo past the ends of the row belongs to no segment
        ids_q = ids_kv = jnp.ones((1, queries), jnp.int32)
    if ids_q is not None:
        ids_q, ids_kv = own_blocks(plan, ids_q), reached_blocks(plan, ids_kv)
    parts = []
    for start, count in pieces:
        shape = (1, 1, positions, count)
        ahead = lax.broadcasted_iota(jnp.int32, shape, 2) + (shift - start) - lax.broadcasted_iota(jnp.int32, shape, 3)
        tests = []
        if plan.causal:
            tests.append(ahead >= 0)
        if plan.window is not None:
            tests.append(ahead < plan.window)
            if not plan.causal:
                tests.append(ahead > -plan.window)
        if ids_q is not None:
            tests.append(
                (ids_q[:, :, :, None] == ids_kv[:, :, None, start : start + count]) & (ids_q != 0)[:, :, :, None]
            )
        if not tests:
            return None
        parts.append(functools.reduce(jnp.logical_and, tests))
    # XLA CPU does not fuse through a concatenation, so the comparisons run once and not again for every head and every
    # use.
    return jnp.concatenate(parts, -1)


def own_blocks(plan, x):
    """(B, T, ..) -> (B, I, C, ..), padded with zeros at the end."""
    if not plan.size:
        return x[:, None]
    blocks = -(-x.shape[1] // plan.size)
    x = jnp.pad(x, [(0, 0), (0, blocks * plan.size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], blocks, plan.size, *x.shape[2:])


def join_blocks(plan, x, positions):
    """(B, I, C, ..) -> (B, T, ..)."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :positions]


def _pieces(plan):
    """Split the reach of a block into runs of at most one block: (start, length) of each."""
    reached = plan.left + plan.size + plan.right
    return [(start, min(plan.size, reached - start)) for start in range(0, reached, plan.size)]


def reached_blocks(plan, x):
    """(B, T, ..) -> (B, I, S, ..): the keys each block reaches, zeros past the ends of the row."""
    if not plan.size:
        return x[:, None]
    length = -(-x.shape[1] // plan.size) * plan.size
    last = _pieces(plan)[-1][0]
    padded = jnp.pad(x, [(0, 0), (plan.left, max(0, length + last - plan.left - x.shape[1]))] + [(0, 0)] * (x.ndim - 2))
    parts = []
    for start, count in _pieces(plan):
        part = lax.slice_in_dim(padded, start, start + length, axis=1)
        parts.append(part.reshape(x.shape[0], -1, plan.size, *x.shape[2:])[:, :, :count])
    return jnp.concatenate(parts, 2)


def sum_reached_blocks(plan, x, positions):
    """Transpose of `reached_blocks`: (B, I, S, ..) -> (B, T, ..), summing over the blocks that share a key."""
    if not plan.size:
        return x[:, 0]
    batch, blocks = x.shape[:2]
    rest = [(0, 0)] * (x.ndim - 3)
    total = None
    width = plan.left + blocks * plan.size + plan.right
    for start, count in _pieces(plan):
        part = jnp.pad(x[:, :, start : start + count], [(0, 0), (0, 0), (0, plan.size - count)] + rest)
        part = part.reshape(batch, blocks * plan.size, *x.shape[3:])
        after = width - start - blocks * plan.size
        part = lax.pad(part, jnp.zeros((), x.dtype), [(0, 0, 0), (start, after, 0)] + [(0, 0, 0)] * (x.ndim - 3))
        total = part if total is None else total + part
    return lax.slice_in_dim(total, plan.left, plan.left + positions, axis=1)


def _query_blocks(plan, x, key_heads):
    """(B, T, N, H) -> (B, I, K, G, C, H)."""
    x = own_blocks(plan, x)
    x = x.reshape(*x.shape[:3], key_heads, -1, x.shape[-1])
    return x.transpose(0, 1, 3, 4, 2, 5)


def _key_blocks(plan, x):
    """(B, T, K, H) -> (B, I, K, S, H)."""
    return reached_blocks(plan, x).transpose(0, 1, 3, 2, 4)


def _logits(q, k, mask, scale):
    logits = einsum("bikgch,biksh->bikgcs", q, k) * scale
    return logits if mask is None else jnp.where(mask[:, :, None, None], logits, -jnp.inf)


def result_forms(q, wide):
    """Return the output dtype, and the log-sum-exp of a query that attends nothing: -inf with `wide`, for merging."""
    return (accumulator(q.dtype), -jnp.inf) if wide else (q.dtype, 0)


def masked_forward(q, k, v, *ids, plan, scale, wide=False):
    """-> out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing).

    With `wide` out is in float32 and that lse is -inf. The other forms take it alike.
    """
    dtype, nothing = result_forms(q, wide)
    plan, (ids_q, ids_kv) = Plan(*plan), ids or (None, None)
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    mask = allowed(plan, queries, keys, ids_q, ids_kv)
    logits = _logits(_query_blocks(plan, q, key_heads), _key_blocks(plan, k), mask, scale)
    peak = jnp.max(logits, -1, keepdims=True)
    peak = jnp.where(peak > -jnp.inf, peak, 0)
    weights = jnp.exp(logits - peak).astype(q.dtype)
    # Summed from the rounded weights: the average is then exactly normalised, and the exponential is evaluated once.
    total = jnp.sum(weights.astype(logits.dtype), -1, keepdims=True)
    divisor = jnp.where(total > 0, total, 1)
    out = (einsum("bikgcs,biksj->bikgcj", weights, _key_blocks(plan, v)) / divisor).astype(dtype)
    out = join_blocks(plan, out.transpose(0, 1, 4, 2, 3, 5), queries).reshape(batch, queries, heads, -1)
    lse = peak + jnp.log(divisor)
    lse = (jnp.where(total > 0, lse, nothing) if wide else lse)[..., 0].transpose(0, 2, 3, 1, 4)
    return out, lse.reshape(batch, heads, -1)[:, :, :queries]


def masked_backward(g, q, k, v, out, lse, *ids, plan, scale):
    """-> dq, dk, dv in the dtype of q. Probabilities are computed again from lse, never stored."""
    plan, (ids_q, ids_kv) = Plan(*plan), ids or (None, None)
    queries = q.shape[1]
    keys, key_heads = k.shape[1:3]
    wide = accumulator(q.dtype)
    g = g.astype(q.dtype)
    delta = jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True)
    delta, lse = (_query_blocks(plan, x, key_heads) for x in (delta, lse.transpose(0, 2, 1)[..., None]))
    qb, gb = _query_blocks(plan, q, key_heads), _query_blocks(plan, g, key_heads)
    kb, vb = _key_blocks(plan, k), _key_blocks(plan, v)
    p = jnp.exp(_logits(qb, kb, allowed(plan, queries, keys, ids_q, ids_kv), scale) - lse).astype(q.dtype)
    ds = (p.astype(wide) * (einsum("bikgcj,biksj->bikgcs", gb, vb) - delta) * scale).astype(q.dtype)
    dq = einsum("bikgcs,biksh->bikgch", ds, kb).astype(q.dtype)
    dq = join_blocks(plan, dq.transpose(0, 1, 4, 2, 3, 5), queries).reshape(q.shape)
    # (.., J, S) and (.., H, S): with the small operand first only it is transposed, never p or ds.
    dv = sum_over_rows(gb, p, batch=3).transpose(0, 1, 4, 2, 3)
    dk = sum_over_rows(qb, ds, batch=3).transpose(0, 1, 4, 2, 3)
    dk, dv = (sum_reached_blocks(plan, x, keys) for x in (dk, dv))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)
