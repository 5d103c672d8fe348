"""Running stacked layers: what is scanned, and what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mindvl_jax.parallel.activations import constrain_rows, places_are_spread

SAVED_PRODUCT = "matrix_product"
"""Name of the activations that remat policy `dots` keeps: the results of the attention and feed-forward products."""


def keep(x: jax.Array) -> jax.Array:
    """Mark a matrix product's result as worth keeping under remat policy `dots`."""
    return checkpoint_name(x, SAVED_PRODUCT)


def rematerialise(body: Callable, policy: str, *, looped: bool) -> Callable:
    """Wrap a layer by the config's `remat`: none, full (keep layer inputs), dots (keep products).

    `attention` is the business of the layers themselves: see `rematerialise_attention`.

    Args:
      looped: the layer is the body of a loop. Forward and backward pass are two loops then, which no compiler merges,
        and barriers against that would only be in its way.
    """
    if policy in ("none", "attention"):
        return body
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=not looped)
    if policy == "dots":
        # By name, not by primitive: products sit inside operators, which a policy over dot_general would not see on
        # every platform.
        return jax.checkpoint(
            body, prevent_cse=not looped, policy=jax.checkpoint_policies.save_only_these_names(SAVED_PRODUCT)
        )
    raise ValueError(f"remat is {policy!r}; expected none, full, dots or attention")


def rematerialise_attention(function: Callable, policy: str) -> Callable:
    """Under remat `attention` the norm, projections and attention are recomputed; the feed-forward activations are
    kept.
    """
    return jax.checkpoint(function, prevent_cse=False) if policy == "attention" else function


UNROLLED_LAYERS = 8
"""Stacks up to this depth are unrolled without remat: a loop copies its residuals for the backward pass, a third of a
four-layer model's step on a CPU (benchmarks/LOG.md). Deeper stacks compile one body, whatever their depth."""


def scan_layers(
    body: Callable[[jax.Array, Any], jax.Array], x: jax.Array, stack: Any, *, remat: str = "none"
) -> jax.Array:
    """`x = body(x, layer)` over the leading axis of `stack`, one compiled body for all layers of a deep stack.

    An array that is carried lies with its rows on the devices of those rows, before and after each layer.
    """
    return _scan(rematerialise(_in_rows(body), remat, looped=_depth(stack) > 1), x, stack, remat)


def _in_rows(body: Callable) -> Callable:
    def place(x):
        return constrain_rows(x) if isinstance(x, jax.Array) else x

    return lambda x, layer: place(body(place(x), layer))


PIECES = 8


def in_pieces(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function` of (B, P, ..), which treats every place alike, an eighth of the places at a time; the backward pass
    has x alone to keep.

    A loop for the reason that a rematerialised layer is one. Rows whose places cannot be split go through as they are.
    """
    B, P, *rest = x.shape
    if P % PIECES:
        return jax.checkpoint(function)(x)
    piecewise = jax.checkpoint(function, prevent_cse=False)
    if places_are_spread():  # every eighth place, so that each device has its part of each piece
        pieces = jnp.moveaxis(x.reshape(B, P // PIECES, PIECES, *rest), 2, 0)
        out = jnp.moveaxis(jax.lax.map(piecewise, pieces), 0, 2)
    else:
        out = jax.lax.map(piecewise, x.reshape(B, PIECES, P // PIECES, *rest).swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(B, P, *out.shape[3:])


def _depth(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _scan(body: Callable, x: jax.Array, stack: Any, remat: str) -> jax.Array:
    """With a remat policy a stack is a loop however shallow it is.

    Unrolled, a layer that is computed again stands beside the first time it was computed, and XLA makes one of the two:
    on a CPU it drops the barriers against that before it looks for equal operations.
    """
    if _depth(stack) == 1:
        return body(x, jax.tree.map(lambda leaf: leaf[0], stack))
    unroll = remat == "none" and _depth(stack) <= UNROLLED_LAYERS
    return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), x, stack, unroll=unroll)[0]


def alternation(depth: int, special: tuple[int, ...]) -> tuple[int, list[tuple[bool, int]]]:
    """Find the period of a stack with special layers.

    Args:
      depth: number of layers. special: indexes of the special ones, in any order.

    Returns:
      repeats and the runs (is_special, count) of one repetition; repeats * (sum of counts) == depth. The published 32
      layers with 7, 15, 23, 31 give 4 and [(False, 7), (True, 1)]: two compiled bodies. A list without a pattern gives
      1 and all runs.

    Raises:
      ValueError: an index outside the stack.
    """
    outside = [index for index in special if not 0 <= index < depth]
    if outside:
        raise ValueError(f"layer indexes {outside} are outside a stack of {depth} layers (0 to {depth - 1})")
    flags = [index in special for index in range(depth)]
    period = next(p for p in range(1, depth + 1) if depth % p == 0 and flags == flags[:p] * (depth // p))
    runs: list[tuple[bool, int]] = []
    for flag in flags[:period]:
        if runs and runs[-1][0] == flag:
            runs[-1] = (flag, runs[-1][1] + 1)
        else:
            runs.append((flag, 1))
    return depth // period, runs


def scan_alternating(
    ordinary: Callable,
    special: Callable,
    x: jax.Array,
    stack: Any,
    depth: int,
    special_indexes: tuple[int, ...],
    *,
    remat: str = "none",
) -> jax.Array:
    """`scan_layers` for a stack whose special layers run another body.

    Both kinds share one parameter stack in layer order, so checkpoints and sharding know nothing of the pattern.
    """
    repeats, runs = alternation(depth, special_indexes)
    period = depth // repeats

    def one_period(x, layers):
        start = 0
        for is_special, count in runs:
            run = jax.tree.map(lambda leaf, start=start, count=count: leaf[start : start + count], layers)
            x = scan_layers(special if is_special else ordinary, x, run, remat=remat)
            start += count
        return x

    return _scan(one_period, x, jax.tree.map(lambda leaf: leaf.reshape(repeats, period, *leaf.shape[1:]), stack), remat)


def scan_layers_with_aux(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, stack: Any, *, remat: str = "none"
) -> tuple[jax.Array, Any]:
    """`x, aux = body(x, layer)` over the leading axis of `stack`; aux comes back stacked.

    Under remat the body runs twice, but its aux is returned by the first run alone, so sums over it count once.
    """
    depth = _depth(stack)
    unroll = remat == "none" and depth <= UNROLLED_LAYERS
    return jax.lax.scan(rematerialise(body, remat, looped=depth > 1), x, stack, unroll=unroll)
