"""Ring attention: every device keeps its queries, keys and values travel around the context axis.

B rows, T places, N query heads, K key/value heads, H head dim; C devices of the ring, t = T / C places of one.

Partial results are merged by their log-sum-exps in float32; the backward pass reads the merged output and log-sum-exp,
so that each round's probabilities are those of the whole row. Gradients of keys and values travel with them and take
one more hop home. (Liu et al., arXiv 2310.01889.)

Causal rows lie in zigzag: of 2 C equal chunks device r holds r and 2 C - 1 - r. Then every device attends the same
number of pairs in every round: of an earlier device's keys all queries read the first half, a later one's keys are read
by the second half of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from npu_bridge import ops

AXIS = "context"


def zigzag(places: int, size: int) -> np.ndarray:
    """Which place of a row lies where: entry i is the place that comes to index i."""
    chunks = np.arange(places).reshape(2 * size, -1)
    return np.concatenate([chunks[[rank, 2 * size - 1 - rank]].reshape(-1) for rank in range(size)])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attention(q, k, v, ids, size: int, causal: bool, static: tuple[tuple[str, object], ...]) -> jax.Array:
    """Attention of this device's places over those of the whole ring, inside a shard_map over `context`.

    Args:
      q: (B, t, N, H). k, v: (B, t, K, H). ids: (B, T), of all places in the order in which they lie.
      size: C. causal: places lie in zigzag. static: further arguments of `ops.attention`, by name.
    """
    return _forward(q, k, v, ids, size, causal, static)[0]


def _turn(arrays: Sequence[jax.Array], size: int) -> tuple[jax.Array, ...]:
    """What the device before holds."""
    return tuple(lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)]) for x in arrays)


def _ids_of(ids, rank, t: int):
    return lax.dynamic_slice_in_dim(ids, rank * t, t, axis=1)


def _round(number: int, size: int, causal: bool, t: int, ids, attend, carried):
    """One round by its case: `attend(carried, first query, keys, ids of these queries and keys, causal)`."""
    me = lax.axis_index(AXIS)
    own, other = _ids_of(ids, me, t), _ids_of(ids, (me - number) % size, t)
    if number == 0 or not causal:
        return attend(carried, 0, t, own, other, causal)
    half = t // 2
    return lax.cond(
        me >= number,
        lambda carried: attend(carried, 0, half, own, other[:, :half], False),
        lambda carried: attend(carried, half, t, own[:, half:], other, False),
        carried,
    )


def _forward(q, k, v, ids, size, causal, static):
    t, moving = q.shape[1], (k, v)
    empty = (
        jnp.zeros((*q.shape[:3], v.shape[-1]), jnp.float32),
        jnp.full((q.shape[0], q.shape[2], t), -jnp.inf, jnp.float32),
    )

    def attend(keys, merged, first, length, own, other, diagonal):
        k, v = keys
        out, lse = ops.attention(
            q[:, first:], k[:, :length], v[:, :length], segment_ids_q=own, segment_ids_kv=other, causal=diagonal,
            return_lse=True, **dict(static),
        )  # fmt: skip
        if first:  # queries before it read nothing in this round
            out = jnp.pad(out, ((0, 0), (first, 0), (0, 0), (0, 0)))
            lse = jnp.pad(lse, ((0, 0), (0, 0), (first, 0)), constant_values=-jnp.inf)
        return ops.merge_attention(merged, (out, lse))

    merged = empty
    for number in range(size):
        if number:
            moving = _turn(moving, size)
        merged = _round(number, size, causal, t, ids, partial(attend, moving), merged)
    out, lse = merged
    return out.astype(q.dtype), (q, k, v, ids, out, lse)


def _backward(size, causal, static, saved, g):
    q, k, v, ids, out, lse = saved
    t = q.shape[1]

    def attend(keys, sums, first, length, own, other, diagonal):
        (k, v), (dq, dk, dv) = keys, sums
        parts = ops.attention_gradients(
            g[:, first:], q[:, first:], k[:, :length], v[:, :length], out[:, first:], lse[..., first:],
            segment_ids_q=own, segment_ids_kv=other, causal=diagonal, **dict(static),
        )  # fmt: skip
        a, b, c = (x.astype(jnp.float32) for x in parts)
        rest = ((0, 0), (0, t - length), (0, 0), (0, 0))
        return dq + jnp.pad(a, ((0, 0), (first, 0), (0, 0), (0, 0))), dk + jnp.pad(b, rest), dv + jnp.pad(c, rest)

    moving, dq, dk, dv = (k, v), *(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for number in range(size):
        if number:
            *moving, dk, dv = _turn((*moving, dk, dv), size)
        dq, dk, dv = _round(number, size, causal, t, ids, partial(attend, tuple(moving)), (dq, dk, dv))
    if size > 1:
        dk, dv = _turn((dk, dv), size)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), np.zeros(ids.shape, jax.dtypes.float0)


ring_attention.defvjp(_forward, _backward)
