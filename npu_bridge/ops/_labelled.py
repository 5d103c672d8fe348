"""Cross entropy over labelled positions only, for programs of one device: sort their rows first, then loop over chunks
of them.

n = B * T positions, C positions of a chunk, D model width, V vocabulary. In a mixture of questions and answers one
token in three to ten carries a label; only these, and the padding of the last chunk, are multiplied by the output
matrix.
"""

import jax.numpy as jnp
from jax import lax

from npu_bridge.ops._common import accumulator, dot, einsum, sum_over_rows


def _order(weights, at_most):
    """Return positions with the labelled first (padded to whole chunks), rank of each labelled one, their number, C.
    Chunks are small, so that little padding is computed, but not smaller: each adds to a (D, V) sum.
    """
    live = weights.reshape(-1) != 0
    n = live.size
    piece = min(at_most, max(256, -(-n // 128) * 16))
    order = jnp.argsort(~live, stable=True).astype(jnp.int32)
    return (
        jnp.pad(order, (0, -n % piece)),
        jnp.cumsum(live.astype(jnp.int32)) - 1,
        jnp.sum(live.astype(jnp.int32)),
        piece,
    )


def _rows(x, positions):
    return x.at[positions].get(mode="promise_in_bounds")


def _in_place(sorted_rows, rank, weights):
    """Scatter rows in the order of `_order` back to their (B, T) positions; zeros at dead ones."""
    live = weights.reshape(-1) != 0
    rows = _rows(sorted_rows, jnp.maximum(rank, 0))
    rows = jnp.where(live.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
    return rows.reshape(*weights.shape, *rows.shape[1:])


def _piece(hidden, order, count, start, size):
    """Return a chunk's positions, a (C,) mask of the labelled ones, and their hidden rows, zero elsewhere."""
    positions = lax.dynamic_slice_in_dim(order, start, size)
    live = start + lax.iota(jnp.int32, size) < count
    return positions, live, jnp.where(live[:, None], _rows(hidden, positions), 0)


def labelled_forward(hidden, head, targets, weights, *, chunk):
    """As `cross_entropy_forward`; lse is 0 at dead positions."""
    head = head.astype(hidden.dtype)
    vocabulary = head.shape[1]
    order, rank, count, size = _order(weights, hidden.shape[0] * min(chunk, hidden.shape[1]))
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def one(state):
        start, nll, lse = state
        positions, live, rows = _piece(hidden, order, count, start, size)
        wanted = _rows(targets, positions)
        logits = dot(rows, head, ((1,), (0,)))
        peak = jnp.max(logits, -1)
        total = peak + jnp.log(jnp.sum(jnp.exp(logits - peak[:, None]), -1))
        known = (wanted >= 0) & (wanted < vocabulary)
        picked = jnp.take_along_axis(logits, jnp.where(known, wanted, 0)[:, None], 1, mode="promise_in_bounds")[:, 0]
        loss = jnp.where(live, total - jnp.where(known, picked, jnp.nan), 0)
        return (
            start + size,
            lax.dynamic_update_slice_in_dim(nll, loss, start, 0),
            lax.dynamic_update_slice_in_dim(lse, total, start, 0),
        )

    empty = jnp.zeros(order.size, accumulator(hidden.dtype))
    _, nll, lse = lax.while_loop(lambda state: state[0] < count, one, (jnp.int32(0), empty, empty))
    return _in_place(nll, rank, weights), _in_place(lse, rank, weights)


def labelled_backward(g, hidden, head, targets, weights, lse, *, chunk):
    """As `cross_entropy_backward`."""
    narrow_head = head.astype(hidden.dtype)
    order, rank, count, size = _order(weights, hidden.shape[0] * min(chunk, hidden.shape[1]))
    slope = (g * weights).astype(lse.dtype).reshape(-1)
    width, lse, targets = hidden.shape[-1], lse.reshape(-1), targets.reshape(-1)
    hidden = hidden.reshape(-1, width)

    def one(state):
        start, dhidden, dhead = state
        positions, live, rows = _piece(hidden, order, count, start, size)
        wanted, total = _rows(targets, positions), _rows(lse, positions)
        steep = jnp.where(live, _rows(slope, positions), 0)
        logits = dot(rows, narrow_head, ((1,), (0,)))
        hit = wanted[:, None] == lax.broadcasted_iota(targets.dtype, logits.shape, 1)
        dlogits = ((jnp.exp(logits - total[:, None]) - hit) * steep[:, None]).astype(rows.dtype)
        drows = einsum("cv,dv->cd", dlogits, narrow_head).astype(rows.dtype)
        return (
            start + size,
            lax.dynamic_update_slice_in_dim(dhidden, drows, start, 0),
            dhead + sum_over_rows(rows, dlogits),
        )

    start = jnp.int32(0), jnp.zeros((order.size, width), hidden.dtype), jnp.zeros(head.shape, accumulator(hidden.dtype))
    _, dhidden, dhead = lax.while_loop(lambda state: state[0] < count, one, start)
    return _in_place(dhidden, rank, weights), dhead
