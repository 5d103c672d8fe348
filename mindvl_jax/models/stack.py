"""Running stacked layers: what is scanned, and what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

SAVED_PRODUCT = "matrix_product"
"""Name of the activations that remat policy `dots` keeps: the results of the attention and feed-forward products."""


def keep(x: jax.Array) -> jax.Array:
    """Mark a matrix product's result as worth keeping under remat policy `dots`."""
    return checkpoint_name(x, SAVED_PRODUCT)


def rematerialise(body: Callable, policy: str) -> Callable:
    """Wrap a layer by the config's `remat`: none, full (keep layer inputs), dots (keep products).

    `attention` is the business of the layers themselves: see `rematerialise_attention`.
    """
    if policy in ("none", "attention"):
        return body
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if policy == "dots":
        # By name, not by primitive: products sit inside operators, which a policy over dot_general would not see on every platform.
        return jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(SAVED_PRODUCT))
    raise ValueError(f"remat is {policy!r}; expected none, full, dots or attention")


def rematerialise_attention(function: Callable, policy: str) -> Callable:
    """Under remat `attention` the norm, projections and attention are recomputed; the feed-forward activations are kept."""
    return jax.checkpoint(function, prevent_cse=False) if policy == "attention" else function


UNROLLED_LAYERS = 8
"""Stacks up to this deep are unrolled: a loop copies what it keeps for the backward pass, which cost a four-layer model on a CPU a
third of its step (benchmarks/LOG.md); deeper stacks compile one body, whatever their depth."""


def scan_layers(body: Callable[[jax.Array, Any], jax.Array], x: jax.Array, stack: Any) -> jax.Array:
    """`x = body(x, layer)` over the leading axis of `stack`, one compiled body for all layers of a deep stack."""
    depth = jax.tree.leaves(stack)[0].shape[0]
    if depth == 1:
        return body(x, jax.tree.map(lambda leaf: leaf[0], stack))
    return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), x, stack, unroll=depth <= UNROLLED_LAYERS)[0]


def alternation(depth: int, special: tuple[int, ...]) -> tuple[int, list[tuple[bool, int]]]:
    """How a stack with some special layers repeats.

    Args:
      depth: number of layers. special: indexes of the special ones, in any order.

    Returns:
      repeats and the runs (is_special, count) of one repetition; repeats * (sum of counts) == depth. The published 32 layers
      with 7, 15, 23, 31 give 4 and [(False, 7), (True, 1)]: two compiled bodies. A list without a pattern gives 1 and all runs.

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


def scan_alternating(ordinary: Callable, special: Callable, x: jax.Array, stack: Any, depth: int, special_indexes: tuple[int, ...]) -> jax.Array:
    """`scan_layers` for a stack whose special layers run another body.

    Both kinds share one parameter stack in layer order, so checkpoints and sharding know nothing of the pattern.
    """
    repeats, runs = alternation(depth, special_indexes)
    period = depth // repeats

    def one_period(x, layers):
        start = 0
        for is_special, count in runs:
            run = jax.tree.map(lambda leaf: leaf[start : start + count], layers)
            x = scan_layers(special if is_special else ordinary, x, run)
            start += count
        return x

    return scan_layers(one_period, x, jax.tree.map(lambda leaf: leaf.reshape(repeats, period, *leaf.shape[1:]), stack))
