"""Attention of packed rows over the mesh: whole rows on the devices that hold them, or rows whose places are spread.

B rows, T places (tokens, or patches), N query heads, K key/value heads, H head dim; t places and n, k heads of one
device.

Where places are spread over the context axis each device holds T / context of them, and one of three forms brings
queries and keys together (`parallel.context_attention`):

- ulysses: heads change places with tokens in one all_to_all each for queries, keys, values and the result. Every device
  then sees whole rows, so kernels, packing and lengths are those of one device. Key heads that the axes do not divide
  are repeated first, no more often than needed. (DeepSpeed Ulysses, arXiv 2309.14509.)
- all_gather: each device keeps its queries and gathers keys and values. Works for any number of heads; a causal device
  with early places computes less than one with late ones. (Llama 3, arXiv 2407.21783, section 3.3.2.)
- ring: keys and values travel from device to device, and no device ever holds more than two parts of them (`ring.py`).

Rotary positions were applied before, by the device that holds the place.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindvl_jax.parallel.activations import Placement, constrain, current, manually
from mindvl_jax.parallel.mesh import AXES
from mindvl_jax.parallel.ring import ring_attention, zigzag
from npu_bridge import ops


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array, lengths: jax.Array | None = None, **static: Any
) -> jax.Array:
    """`npu_bridge.ops.attention` among the places of packed rows, on the devices that hold the rows, heads and places.

    Args:
      q: (B, T, N, H). k, v: (B, T, K, H). segment_ids: (B, T). lengths: (B, M) or None.
      static: as for the operator, arrays excepted.
    """
    placement = current()
    if placement is None:
        return _attend(q, k, v, segment_ids, lengths, None, static)
    context = placement.mesh.shape["context"]
    if context == 1 or q.shape[1] % context:
        return _whole_rows(q, k, v, segment_ids, lengths, placement, static)
    if placement.parallel.context_attention == "all_gather":
        return _gathered_keys(q, k, v, segment_ids, placement, static)
    if placement.parallel.context_attention == "ring":
        return _travelling_keys(q, k, v, segment_ids, placement, static)
    return _exchanged_heads(q, k, v, segment_ids, lengths, placement, static)


def order_of_places(places: int) -> np.ndarray | None:
    """The order in which causal attention wants the places of rows, entry i being the place that comes to index i; None
    where it is the order that they have.
    """
    placement = current()
    if placement is None or placement.parallel.context_attention != "ring":
        return None
    size = placement.mesh.shape["context"]
    return None if size == 1 or places % (2 * size) else zigzag(places, size)


def key_head_copies(query_heads: int, key_heads: int, places: int) -> int:
    """Return how often to repeat each key head, so that `places` devices get equal shares of whole groups.

    Raises:
      ValueError: the query heads themselves have no equal shares.
    """
    if query_heads % places:
        raise ValueError(f"{query_heads} query heads cannot be spread over {places} devices")
    return places // math.gcd(key_heads, places)


def _attend(q, k, v, ids, lengths, placement: Placement | None, static):
    form = None if placement is None else placement.attention
    return ops.attention(
        q, k, v, segment_ids_q=ids, segment_ids_kv=ids, lengths=lengths, implementation=form, **static
    )  # fmt: skip


def _whole_rows(q, k, v, ids, lengths, placement: Placement, static, heads: str | None = "heads") -> jax.Array:
    """Each device attends among whole rows with its share of the heads."""

    def attend(q, k, v, ids, *lengths):
        return _attend(q, k, v, ids, lengths[0] if lengths else None, placement, static)

    arrays = (q, k, v, ids) if lengths is None else (q, k, v, ids, lengths)
    if not placement.manual:
        return attend(*arrays)
    # Query heads read the key head of their group: both are split or neither is.
    if heads == "heads" and k.shape[2] % placement.mesh.shape["tensor"]:
        heads = None
    by_head, rows = ("rows", None, heads, None), ("rows", None)
    return manually(attend, arrays, [by_head, by_head, by_head, rows, *[rows] * (len(arrays) - 4)], 0, placement)


def _exchanged_heads(q, k, v, ids, lengths, placement: Placement, static) -> jax.Array:
    """Ulysses, as changes of layout: the compiler makes one all_to_all of each."""
    copies = key_head_copies(
        q.shape[2], k.shape[2], placement.mesh.shape["context"] * placement.mesh.shape["tensor"]
    )  # fmt: skip
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    q, k, v = (
        constrain(constrain(x, "rows", "places", "heads", None), "rows", None, "context_heads", None) for x in (q, k, v)
    )
    out = _whole_rows(q, k, v, ids, lengths, placement, static, heads="context_heads")
    if not placement.manual:
        # Shardy hands every later reader of a value what its constraints make of it. The backward pass reads the
        # result too, by heads as it was made: without the barrier it would come back by an exchange of its own.
        out = jax.lax.optimization_barrier(out)
    return constrain(
        constrain(out, "rows", None, "context_heads", None), "rows", "places", "heads", None
    )  # fmt: skip


def _travelling_keys(q, k, v, ids, placement: Placement, static) -> jax.Array:
    size, causal = placement.mesh.shape["context"], static["causal"]
    if static.get("window") is not None or (causal and q.shape[1] % (2 * size)):
        raise ValueError(
            f"ring attention over {size} devices: no window, and twice as many even chunks of {q.shape[1]}"
        )
    # The promise of short segments is one of neighbouring places, which zigzag does not keep.
    kept = {name: value for name, value in static.items() if name in ("scale", "padding") and value is not None}
    further = tuple(sorted((kept | {"implementation": placement.attention}).items()))

    def attend(q, k, v, ids):
        return ring_attention(q, k, v, ids, size, causal, further)

    heads = "heads" if not k.shape[2] % placement.mesh.shape["tensor"] else None
    spread = ("rows", "places", heads, None)
    axes = AXES if placement.manual else ("context",)
    return manually(attend, (q, k, v, ids), [spread, spread, spread, ("rows", None)], 0, placement, axes=axes)


def _gathered_keys(q, k, v, ids, placement: Placement, static) -> jax.Array:
    """Own queries, everybody's keys and values.

    The operator takes the last query as level with the last key, so keys are moved until that holds: zeros before them,
    whose id 0 nobody attends, take the place of what is later than the own queries (causal), or of what is further away
    than a segment is long.
    """
    context, causal, longest = placement.mesh.shape["context"], static["causal"], static.get("max_segment_length")
    if static.get("window") is not None:
        raise ValueError("attention with a window over the context axis: use ids that say who attends whom")
    T = q.shape[1]
    t = T // context
    halo = None if causal or longest is None or longest >= T else longest

    def attend(q, k, v, ids_q, ids):
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        start = jax.lax.axis_index("context") * t

        def cut(x, before: int, after: int, size: int):
            pads = [(0, 0)] * x.ndim
            pads[1] = (before, after)
            return jax.lax.dynamic_slice_in_dim(jnp.pad(x, pads), start, size, axis=1)

        if causal:
            k, v, ids = (cut(x, T - t, 0, T) for x in (k, v, ids))
        elif halo is not None:
            k, v, ids = (cut(x, halo, halo, t + 2 * halo) for x in (k, v, ids))
            q, ids_q = (jnp.pad(x, [(0, 0), (0, halo), *[(0, 0)] * (x.ndim - 2)]) for x in (q, ids_q))
        own = {**static, "max_segment_length": longest if causal or halo else None}
        out = ops.attention(
            q, k, v, segment_ids_q=ids_q, segment_ids_kv=ids, implementation=placement.attention, **own
        )  # fmt: skip
        return out[:, :t]

    # Query heads read the key head of their group: both are split or neither is.
    heads = "heads" if not k.shape[2] % placement.mesh.shape["tensor"] else None
    spread = ("rows", "places", heads, None)
    names = [spread, spread, spread, ("rows", "places"), ("rows", None)]
    axes = AXES if placement.manual else ("context",)
    return manually(attend, (q, k, v, ids, ids), names, 0, placement, axes=axes)
