"""Self-attention in tiles (XLA on a CPU). Tiles that segments, causality or padding mask entirely are skipped.

B rows, T positions, I = T / C blocks of C queries, S keys of a step, E blocks of one chunk, N query heads, K key heads,
G
= N / K, H and J head dims. The number of chunks and of steps in each depends on the segment ids at run time: blocks
that attend nothing are sorted last and skipped, the others walk through their range of keys from its end, S keys a
step, with running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135).
Exact up to the order of sums.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from npu_bridge.ops._blocked import result_forms
from npu_bridge.ops._common import accumulator, einsum, sum_over_rows


class Tiles(NamedTuple):
    """Static sizes: queries of a block, keys of a step, blocks of a chunk."""

    queries: int
    keys: int
    piece: int


LEAST_LOGITS = 2**20
"""Below this many logits, the loops and their compilation cost more than they save."""


def tiles_of(batch, positions, heads, band=None):
    """Choose tiles so that the logits of a chunk stay in a core's cache; None if there is too little to gain.

    Args:
      band: largest number of keys that a block of queries reaches, if that is a narrow band of the row.
    """
    size = 32 if positions < 1024 or band is not None else 64
    if batch * heads * positions * (band or positions) < LEAST_LOGITS or positions < 4 * size:
        return None
    return Tiles(size, 2 * size, max(1, min(2**18 // (heads * size * 2 * size), batch * (positions // size))))


class _Blocks(NamedTuple):
    """Blocks sorted by their number of steps, most first; each field has shape (I * B plus padding,).

    Attributes:
      rows, starts: of the block. ends: one past the last key that it attends. steps: of `keys` positions each.
      live: scalar, number of blocks with any step.
    """

    rows: jnp.ndarray
    starts: jnp.ndarray
    ends: jnp.ndarray
    steps: jnp.ndarray
    live: jnp.ndarray


def _blocks(ids_q, ids_kv, tiles, causal, window):
    """Plan the steps of each block. A block attends another if the ranges of their segment ids overlap: conservative,
    and exact for ascending ids.
    """
    size = tiles.queries

    def ranges(ids):
        ids, most = ids.reshape(ids.shape[0], -1, size), jnp.iinfo(ids.dtype).max
        return jnp.min(jnp.where(ids != 0, ids, most), -1), jnp.max(jnp.where(ids != 0, ids, -most), -1)

    (low_q, high_q), (low, high) = ranges(ids_q), ranges(ids_kv)
    touch = (low_q[:, :, None] <= high[:, None]) & (low[:, None] <= high_q[:, :, None])
    count = low.shape[1]
    ahead = lax.broadcasted_iota(jnp.int32, (count, count), 0) - lax.broadcasted_iota(jnp.int32, (count, count), 1)
    if causal:
        touch &= ahead >= 0
    if window is not None:
        touch &= jnp.abs(ahead) * size - (size - 1) < window
    first = jnp.argmax(touch, -1)
    end = count - jnp.argmax(touch[:, :, ::-1], -1)
    steps = jnp.where(jnp.any(touch, -1), -(-(end - first) * size // tiles.keys), 0).reshape(-1)
    order = jnp.argsort(-steps, stable=True)

    def sort(x):
        return jnp.pad(x[order], (0, -order.size % tiles.piece))

    number = lax.iota(jnp.int32, order.size)
    return _Blocks(
        sort(number // count),
        sort(number % count * size),
        sort((end * size).reshape(-1)),
        sort(steps),
        jnp.sum(steps > 0),
    )


def _cut(x, rows, starts, size, axis=1):
    """(B, T, ..) -> (E, C, ..): a stretch of each of these rows; `axis` is that of T, 1 or 2."""
    shape = [1, *x.shape[1:]]
    shape[axis] = size
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim)), collapsed_slice_dims=(0,), start_index_map=(0, axis)
    )
    return lax.gather(x, jnp.stack([rows, starts], 1), dims, tuple(shape), mode="promise_in_bounds")


def _places(x, axis=1):
    return lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, x.ndim)), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, axis)
    )


class _Piece:
    """E blocks, and how their queries are cut out of whole rows and put back."""

    def __init__(self, blocks, ids_q, ids_kv, tiles, start, key_heads):
        self.tiles, self.key_heads = tiles, key_heads
        self.rows, self.starts, self.ends = (lax.dynamic_slice_in_dim(x, start, tiles.piece) for x in blocks[:3])
        self.all_ids = ids_kv
        # What fills the last piece is some block once more, or one that attends nothing: no ids, and put nowhere.
        live = start + lax.iota(jnp.int32, tiles.piece) < blocks.live
        self.ids = jnp.where(live[:, None], _cut(ids_q, self.rows, self.starts, tiles.queries), 0)
        self.targets = jnp.where(live, self.rows, ids_q.shape[0])

    def queries(self, x):
        """(B, T, N, H) -> (E, K, G, C, H)."""
        x = _cut(x, self.rows, self.starts, self.tiles.queries)
        return x.reshape(*x.shape[:2], self.key_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)

    def statistics(self, x):
        """(B, N, T) -> (E, K, G, C, 1)."""
        x = _cut(x, self.rows, self.starts, self.tiles.queries, axis=2)
        return x.reshape(x.shape[0], self.key_heads, -1, x.shape[-1], 1)

    def put_queries(self, whole, x):
        """The inverse of `queries`, into (B, T, N, H)."""
        x = x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[-1])
        return self._put(whole, x, 1)

    def put_statistics(self, whole, x):
        return self._put(whole, x.reshape(x.shape[0], -1, x.shape[3]), 2)

    def _put(self, whole, x, axis):
        where = jnp.stack([self.targets, self.starts], 1)
        return lax.scatter(whole, where, x.astype(whole.dtype), _places(whole, axis), unique_indices=True, mode="drop")

    def step(self, number, causal, window):
        """-> starts (E,) of the keys of a step and (E, 1, 1, C, S) bool, which of them each query attends."""
        size, positions = self.tiles.keys, self.all_ids.shape[1]
        stop = self.ends - number * size
        starts = jnp.clip(stop - size, 0, positions - size)
        key = starts[:, None] + lax.iota(jnp.int32, size)
        query = self.starts[:, None] + lax.iota(jnp.int32, self.tiles.queries)
        # At the start of a row a step may reach keys of the step before: `stop` keeps them from counting twice.
        theirs = jnp.where(key < stop[:, None], _cut(self.all_ids, self.rows, starts, size), 0)
        mask = (self.ids[:, :, None] == theirs[:, None]) & (self.ids != 0)[:, :, None]
        ahead = query[:, :, None] - key[:, None]
        if causal:
            mask &= ahead >= 0
        if window is not None:
            mask &= jnp.abs(ahead) < window
        return starts, mask[:, None, None]

    def keys(self, x, starts):
        """(B, T, K, H) -> (E, K, S, H)."""
        return _cut(x, self.rows, starts, self.tiles.keys).transpose(0, 2, 1, 3)

    def add_keys(self, whole, starts, x):
        """Add (E, K, H, S) to (B, T, K, H)."""
        return lax.scatter_add(
            whole, jnp.stack([self.rows, starts], 1), x.transpose(0, 3, 1, 2), _places(whole), mode="promise_in_bounds"
        )


def _padded(x, positions):
    return jnp.pad(x, [(0, 0), (0, positions - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def skipping_forward(q, k, v, ids_q, ids_kv, *, tiles, causal, window, scale, wide=False):
    """-> out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing)."""
    batch, real, heads, _ = q.shape
    key_heads, positions = k.shape[2], -(-real // tiles.queries) * tiles.queries
    q, k, v, ids_q, ids_kv = (_padded(x, positions) for x in (q, k, v, ids_q, ids_kv))
    blocks = _blocks(ids_q, ids_kv, tiles, causal, window)
    dtype, nothing = result_forms(q, wide)
    wide = accumulator(q.dtype)
    shape = (tiles.piece, key_heads, heads // key_heads, tiles.queries)

    def one_piece(state):
        start, out, lse = state
        piece = _Piece(blocks, ids_q, ids_kv, tiles, start, key_heads)
        queries = piece.queries(q)

        def one_step(state):
            number, peak, total, average = state
            starts, mask = piece.step(number, causal, window)
            logits = einsum("ekgch,eksh->ekgcs", queries, piece.keys(k, starts)) * scale
            logits = jnp.where(mask, logits, -jnp.inf)
            higher = jnp.maximum(peak, jnp.max(logits, -1, keepdims=True))
            level = jnp.where(higher > -jnp.inf, higher, 0)
            weights = jnp.exp(logits - level).astype(q.dtype)
            shrink = jnp.exp(peak - level)
            total = total * shrink + jnp.sum(weights.astype(wide), -1, keepdims=True)
            average = average * shrink + einsum("ekgcs,eksj->ekgcj", weights, piece.keys(v, starts))
            return number + 1, higher, total, average

        empty = jnp.zeros((*shape, 1), wide)
        first = jnp.int32(0), empty - jnp.inf, empty, jnp.zeros((*shape, v.shape[-1]), wide)
        _, peak, total, average = lax.while_loop(lambda state: state[0] < blocks.steps[start], one_step, first)
        divisor = jnp.where(total > 0, total, 1)
        logs = jnp.where(total > 0, peak, nothing) + jnp.log(divisor)
        return start + tiles.piece, piece.put_queries(out, average / divisor), piece.put_statistics(lse, logs)

    empty = (
        jnp.zeros((batch, positions, heads, v.shape[-1]), dtype),
        jnp.full((batch, heads, positions), nothing, accumulator(q.dtype)),
    )
    _, out, lse = lax.while_loop(lambda state: state[0] < blocks.live, one_piece, (jnp.int32(0), *empty))
    return out[:, :real], lse[..., :real]


def skipping_backward(g, q, k, v, out, lse, ids_q, ids_kv, *, tiles, causal, window, scale):
    """-> dq, dk, dv in the dtype of q."""
    real = q.shape[1]
    key_heads, positions = k.shape[2], -(-real // tiles.queries) * tiles.queries
    wide, narrow = accumulator(q.dtype), q.dtype
    g = g.astype(narrow)
    delta = jnp.sum(g.astype(wide) * out.astype(wide), -1).transpose(0, 2, 1)
    delta, lse = (jnp.pad(x, [(0, 0), (0, 0), (0, positions - real)]) for x in (delta, lse))
    g, q, k, v, ids_q, ids_kv = (_padded(x, positions) for x in (g, q, k, v, ids_q, ids_kv))
    blocks = _blocks(ids_q, ids_kv, tiles, causal, window)

    def flat(x):
        return x.reshape(tiles.piece, key_heads, -1, x.shape[-1])

    def one_piece(state):
        start, dq, dk, dv = state
        piece = _Piece(blocks, ids_q, ids_kv, tiles, start, key_heads)
        queries, gradients, deltas, logs = (
            piece.queries(q),
            piece.queries(g),
            piece.statistics(delta),
            piece.statistics(lse),
        )

        def one_step(state):
            number, dqueries, dk, dv = state
            starts, mask = piece.step(number, causal, window)
            keys, values = piece.keys(k, starts), piece.keys(v, starts)
            logits = einsum("ekgch,eksh->ekgcs", queries, keys) * scale
            p = jnp.exp(jnp.where(mask, logits, -jnp.inf) - logs).astype(narrow)
            ds = (p.astype(wide) * (einsum("ekgcj,eksj->ekgcs", gradients, values) - deltas) * scale).astype(narrow)
            # (.., J, S) and (.., H, S): with the small operand first only it is transposed, never p or ds.
            dv = piece.add_keys(dv, starts, sum_over_rows(flat(gradients), flat(p), batch=2))
            dk = piece.add_keys(dk, starts, sum_over_rows(flat(queries), flat(ds), batch=2))
            return number + 1, dqueries + einsum("ekgcs,eksh->ekgch", ds, keys), dk, dv

        first = jnp.int32(0), jnp.zeros(queries.shape, wide), dk, dv
        _, dqueries, dk, dv = lax.while_loop(lambda state: state[0] < blocks.steps[start], one_step, first)
        return start + tiles.piece, piece.put_queries(dq, dqueries), dk, dv

    first = jnp.int32(0), jnp.zeros(q.shape, narrow), jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    _, dq, dk, dv = lax.while_loop(lambda state: state[0] < blocks.live, one_piece, first)
    return tuple(x[:, :real].astype(narrow) for x in (dq, dk, dv))
