"""Attention with memory linear in the row, in plain JAX, for any platform and for sharded rows and heads.

B rows, T query positions, S key positions, N query heads, K key heads, G = N / K, H and J head dims. Queries are taken
in steps of E blocks of C positions. Each step walks through its keys, C at a time, with running maximum and sum
(Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135), so at most B * N * E * C * C logits exist.
Loop bounds depend only on shapes: no device waits for another, and XLA partitions by rows and heads without
collectives.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from npu_bridge.ops._blocked import result_forms
from npu_bridge.ops._common import accumulator, einsum, sum_over_rows


class Tiling(NamedTuple):
    """Static shape of the loops.

    Attributes:
      block: C. group: E; 1 unless the reach of a query is bounded.
      before, behind: blocks of keys that a block of queries reaches on either side of its own; None where any key may
        be reached.
    """

    block: int
    group: int
    before: int | None
    behind: int | None


LOGITS_A_ROW = 2**23
"""Logits of one row that exist at a time: 32 MiB in float32."""


def tiling_of(queries, keys, heads, *, left=None, right=None):
    """The loops for a row.

    Args:
      left, right: keys that a query reaches before and behind itself; None: all. Only self-attention has bounds.
    """
    if left is None:
        block = min(512, _power_of_two(max(queries, keys)))
        return Tiling(block, 1, None, None)
    block = max(128, min(512, _power_of_two(left + right)))
    before, behind = -(-left // block), -(-right // block)
    group = max(1, min(LOGITS_A_ROW // (heads * block * block), -(-queries // block)))
    return Tiling(block, group, before, behind)


def _power_of_two(number):
    """The least power of two that is not below `number`, at least 16."""
    return max(16, 1 << math.ceil(math.log2(max(number, 1))))


class _Loops:
    """Padded operands of one call, and how steps cut their tiles out of them."""

    def __init__(self, tiling, queries, keys, *, causal, window):
        self.block, self.group, self.before, self.behind = tiling
        self.queries, self.keys, self.causal, self.window = queries, keys, causal, window
        self.banded = self.before is not None
        self.steps = -(-queries // (self.block * self.group))
        self.padded_queries = self.steps * self.group * self.block
        # The halo before the row is made of padding too, so that the first block reads as far back as the others.
        self.lead = self.before * self.block if self.banded else 0
        if self.banded:
            self.padded_keys = self.lead + self.padded_queries + self.behind * self.block
        else:
            self.padded_keys = -(-keys // self.block) * self.block

    def pad_queries(self, x, value=0):
        return _pad(x, 0, self.padded_queries - x.shape[1], value)

    def pad_keys(self, x, value=0):
        return _pad(x, self.lead, self.padded_keys - self.lead - x.shape[1], value)

    def cut_queries(self, x, step):
        """(B, T', ..) -> (B, E, C, ..)"""
        return self._cut(x, step * self.group)

    def cut_keys(self, x, step, number):
        return self._cut(x, self.first_key_block(step) + number)

    def _cut(self, x, block):
        part = lax.dynamic_slice_in_dim(x, block * self.block, self.group * self.block, 1)
        return part.reshape(x.shape[0], self.group, self.block, *x.shape[2:])

    def add_keys(self, whole, x, step, number):
        """Add (B, E, C, ..) where `cut_keys` took it from."""
        start = (self.first_key_block(step) + number) * self.block
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        old = lax.dynamic_slice_in_dim(whole, start, x.shape[1], 1)
        return lax.dynamic_update_slice_in_dim(whole, old + x, start, 1)

    def first_key_block(self, step):
        return step * self.group if self.banded else 0

    def key_steps(self, step):
        """Number of key tiles in a step."""
        if self.banded:
            return self.before + 1 + self.behind
        last = self.padded_keys // self.block
        if not self.causal:
            return last
        reached = (step + 1) * self.block + (self.keys - self.queries)
        return jnp.clip(-(-reached // self.block), 0, last)

    def mask(self, step, number, ids_q, ids_kv):
        """(B or 1, E, C, C) bool.

        Ids (B, T') and (B, S') carry different values in the padding, so that it is never attended.
        """
        positions = (1, self.group, self.block, self.block)
        block = lax.broadcasted_iota(jnp.int32, positions, 1) * self.block
        query = (
            step * self.group * self.block
            + block
            + lax.broadcasted_iota(jnp.int32, positions, 2)
            + (self.keys - self.queries)
        )
        key = (
            (self.first_key_block(step) + number) * self.block
            + block
            + lax.broadcasted_iota(jnp.int32, positions, 3)
            - self.lead
        )
        ahead = query - key
        allowed = self.cut_queries(ids_q, step)[..., :, None] == self.cut_keys(ids_kv, step, number)[..., None, :]
        if self.causal:
            allowed &= ahead >= 0
        if self.window is not None:
            allowed &= ahead < self.window
            if not self.causal:
                allowed &= ahead > -self.window
        return allowed


NO_QUERY, NO_KEY = -1, -2


def _pad(x, before, behind, value):
    return jnp.pad(x, [(0, 0), (before, behind)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _ids(loops, q, k, ids_q, ids_kv):
    """Ids of padded rows. Id 0 attends nothing, so it becomes that of the padding."""
    if ids_q is None:
        ids_q, ids_kv = jnp.ones((1, q.shape[1]), jnp.int32), jnp.ones((1, k.shape[1]), jnp.int32)
    ids_q = jnp.where(ids_q == 0, NO_QUERY, ids_q.astype(jnp.int32))
    return loops.pad_queries(ids_q, NO_QUERY), loops.pad_keys(ids_kv.astype(jnp.int32), NO_KEY)


def _by_key_head(x, key_heads):
    """(B, E, C, N, H) -> (B, E, K, G, C, H)"""
    return x.reshape(*x.shape[:3], key_heads, -1, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)


def _steps_to_rows(x, positions):
    """(I, B, E, K, G, C, H) of all steps -> (B, T, N, H)"""
    steps, batch, group, key_heads, heads, block, width = x.shape
    return x.transpose(1, 0, 2, 5, 3, 4, 6).reshape(batch, steps * group * block, key_heads * heads, width)[
        :, :positions
    ]


def tiled_forward(q, k, v, ids_q=None, ids_kv=None, *, tiling, causal, window, scale, wide=False):
    """-> out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing)."""
    batch, queries, heads, _ = q.shape
    key_heads = k.shape[2]
    loops = _Loops(tiling, queries, k.shape[1], causal=causal, window=window)
    ids_q, ids_kv = _ids(loops, q, k, ids_q, ids_kv)
    q, k, v = loops.pad_queries(q), loops.pad_keys(k), loops.pad_keys(v)
    dtype, nothing = result_forms(q, wide)
    wide = accumulator(q.dtype)
    shape = (batch, loops.group, key_heads, heads // key_heads, loops.block)

    def one_step(_, step):
        mine = _by_key_head(loops.cut_queries(q, step), key_heads)

        def one_tile(number, state):
            peak, total, average = state
            logits = einsum("bekgch,beskh->bekgcs", mine, loops.cut_keys(k, step, number)) * scale
            logits = jnp.where(loops.mask(step, number, ids_q, ids_kv)[:, :, None, None], logits, -jnp.inf)
            higher = jnp.maximum(peak, jnp.max(logits, -1, keepdims=True))
            level = jnp.where(higher > -jnp.inf, higher, 0)
            weights = jnp.exp(logits - level).astype(q.dtype)
            shrink = jnp.exp(peak - level)
            total = total * shrink + jnp.sum(weights.astype(wide), -1, keepdims=True)
            average = average * shrink + einsum("bekgcs,beskj->bekgcj", weights, loops.cut_keys(v, step, number))
            return higher, total, average

        empty = jnp.zeros((*shape, 1), wide)
        first = empty - jnp.inf, empty, jnp.zeros((*shape, v.shape[-1]), wide)
        peak, total, average = lax.fori_loop(0, loops.key_steps(step), one_tile, first)
        divisor = jnp.where(total > 0, total, 1)
        return None, ((average / divisor).astype(dtype), jnp.where(total > 0, peak, nothing) + jnp.log(divisor))

    _, (out, lse) = lax.scan(one_step, None, jnp.arange(loops.steps))
    return _steps_to_rows(out, queries), _steps_to_rows(lse, queries)[..., 0].transpose(0, 2, 1)


def tiled_backward(g, q, k, v, out, lse, ids_q=None, ids_kv=None, *, tiling, causal, window, scale):
    """-> dq, dk, dv in the dtype of q. Probabilities are computed again from lse, tile by tile."""
    queries, keys, key_heads = q.shape[1], k.shape[1], k.shape[2]
    narrow, wide = q.dtype, accumulator(q.dtype)
    loops = _Loops(tiling, queries, keys, causal=causal, window=window)
    ids_q, ids_kv = _ids(loops, q, k, ids_q, ids_kv)
    g = g.astype(narrow)
    delta = jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True)
    lse = lse.transpose(0, 2, 1)[..., None]
    g, q, delta, lse = (loops.pad_queries(x) for x in (g, q, delta, lse))
    k, v = loops.pad_keys(k), loops.pad_keys(v)

    def flat(x):
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def one_step(state, step):
        queries_, gradients, deltas, logs = (
            _by_key_head(loops.cut_queries(x, step), key_heads) for x in (q, g, delta, lse)
        )

        def one_tile(number, state):
            dqueries, dk, dv = state
            keys_, values = loops.cut_keys(k, step, number), loops.cut_keys(v, step, number)
            logits = einsum("bekgch,beskh->bekgcs", queries_, keys_) * scale
            allowed = loops.mask(step, number, ids_q, ids_kv)[:, :, None, None]
            p = jnp.exp(jnp.where(allowed, logits, -jnp.inf) - logs).astype(narrow)
            ds = (p.astype(wide) * (einsum("bekgcj,beskj->bekgcs", gradients, values) - deltas) * scale).astype(narrow)

            def to_keys(x):
                return x.transpose(0, 1, 4, 2, 3)

            dv = loops.add_keys(dv, to_keys(sum_over_rows(flat(gradients), flat(p), batch=3)), step, number)
            dk = loops.add_keys(dk, to_keys(sum_over_rows(flat(queries_), flat(ds), batch=3)), step, number)
            return dqueries + einsum("bekgcs,beskh->bekgch", ds, keys_), dk, dv

        first = jnp.zeros(queries_.shape, wide), *state
        dqueries, dk, dv = lax.fori_loop(0, loops.key_steps(step), one_tile, first)
        return (dk, dv), dqueries.astype(narrow)

    empty = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    (dk, dv), dq = lax.scan(one_step, empty, jnp.arange(loops.steps))
    dk, dv = (x[:, loops.lead : loops.lead + keys].astype(narrow) for x in (dk, dv))
    return _steps_to_rows(dq, queries), dk, dv
