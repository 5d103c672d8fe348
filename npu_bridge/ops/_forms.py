"""Implementations of attention on XLA, and the choice among them at lowering: by platform, locality and shape.

`reference` holds the scores of the whole row (of a band, where a promise bounds it); `skipping` leaves out masked tiles
on a CPU; `blocked` is linear in the row on any platform and number of devices; `splash` are Pallas' kernels for TPU. B
rows, T query positions, S key positions, N query heads, K key heads, H and J head dims.
"""

from functools import partial

import jax
import jax.numpy as jnp

from npu_bridge.jaxcompat import chosen_function
from npu_bridge.ops import _splash
from npu_bridge.ops._blocked import Plan, masked_backward, masked_forward
from npu_bridge.ops._common import accumulator
from npu_bridge.ops._skipping import skipping_backward, skipping_forward, tiles_of
from npu_bridge.ops._tiled import tiled_backward, tiled_forward, tiling_of

FORMS = ("auto", "reference", "blocked", "splash")

LINEAR_FROM = 2**24
"""Scores of one row (positions x keys in reach x heads) above which `auto` stores none of them: 64 MiB in float32."""

NARROW_BAND = 256
"""A band with narrower halos uses the smaller tiles."""


def choose_form(form, platform, local, *, plan, rows, queries, keys, heads, ids):
    """Choose the form of one call.

    Args:
      form: requested by the caller. platform: XLA's name. local: operands are whole on the computing device.
      plan: `Plan`. ids: whether segment ids are given. The sizes are those of the whole arrays where `local` is False.

    Raises:
      ValueError: `splash` where it is not possible.
    """
    if form == "splash" or (form == "auto" and platform == "tpu" and local):
        refusal = _splash.refusal(queries, keys, causal=plan.causal)
        if refusal is None and not local and platform == "tpu":
            refusal = "XLA cannot partition a kernel; call it inside a shard_map"
        if refusal is None:
            return "splash"
        if form == "splash":
            raise ValueError(f"npu_bridge.ops.attention: implementation 'splash' is asked for, but {refusal}")
    if form != "auto":
        return form
    # XLA on a CPU pays for every masked logit. Other devices compute them faster than they could decide to leave them
    # out.
    if platform == "cpu" and local and _tiles(plan, rows, queries, keys, heads, ids):
        return "skipping"
    reach = min(keys, plan.size + plan.left + plan.right) if plan.size else keys
    return "blocked" if queries * reach * heads >= LINEAR_FROM else "reference"


def describe(form, platform):
    """Describe what `form` selects in programs of this platform."""
    if form != "auto":
        return f"{form}, as configured"
    if platform == "cpu":
        return "in tiles, those left out that are masked"
    linear = f"blocked where a row's scores exceed {LINEAR_FROM * 4 >> 20} MiB"
    return f"by splash kernels; short rows and rows that XLA partitions {linear}" if platform == "tpu" else linear


def _tiles(plan, rows, queries, keys, heads, ids):
    """Tiles of the computation that skips what is masked, where this may gain anything."""
    if queries != keys or (not ids and not plan.causal):
        return None
    narrow = plan.size and plan.left + plan.right < NARROW_BAND
    return tiles_of(rows, queries, heads, band=plan.left + plan.size + plan.right if narrow else None)


def reach(plan):
    """Keys that a query reaches before and behind itself, as (left, right); None: all."""
    left, right = (plan.left, plan.right) if plan.size else (None, None)
    if plan.window is not None:
        left, right = (plan.window - 1 if side is None else min(side, plan.window - 1) for side in (left, right))
    return left, 0 if plan.causal else right


def _chosen(name, masked, skipping, tiled, splash, *, q_at, operands, results):
    """One direction of attention: q is operand number `q_at`, segment ids follow after `operands` arrays."""

    def choose(platform, local, *avals, plan, scale, form, **more):
        (rows, queries, heads, _), keys = avals[q_at].shape, avals[q_at + 1].shape[1]
        shape = dict(plan=Plan(*plan), rows=rows, queries=queries, keys=keys, heads=heads, ids=len(avals) > operands)
        taken = choose_form(form, platform, local, **shape)
        plan = shape["plan"]
        static = dict(causal=plan.causal, window=plan.window, scale=scale, **more)
        left, right = reach(plan)
        if taken == "skipping":
            compute = partial(_with_ids(skipping, operands), tiles=_tiles(**shape), **static)
        elif taken == "blocked":
            bounds = dict(left=left, right=right) if left is not None and queries == keys else {}
            compute = partial(tiled, tiling=tiling_of(queries, keys, heads, **bounds), **static)
        elif taken == "splash":
            compute = partial(splash, left=left, right=right, scale=scale, interpret=platform != "tpu", **more)
        else:
            compute = partial(masked, plan=plan, scale=scale, **more)
        return lambda *arrays, **params: compute(*arrays)

    return chosen_function(name, lambda *arrays, form, **params: masked(*arrays, **params), choose, results=results)


def _with_ids(function, operands):
    """`function` of arrays and int32 segment ids, which are 1 everywhere where none are given."""

    def call(*arrays, **static):
        arrays, ids = arrays[:operands], arrays[operands:]
        rows = arrays[0].shape[:2]  # q or its gradient: without ids, queries and keys are as many
        return function(*arrays, *([x.astype(jnp.int32) for x in ids] or [jnp.ones(rows, jnp.int32)] * 2), **static)

    return call


def _forward_results(q, k, v, *ids, wide=False, **params):
    rows, queries, heads, _ = q.shape
    return [
        jax.ShapeDtypeStruct((rows, queries, heads, v.shape[-1]), accumulator(q.dtype) if wide else q.dtype),
        jax.ShapeDtypeStruct((rows, heads, queries), accumulator(q.dtype)),
    ]


_forward = _chosen(
    "npu_bridge.attention_form",
    masked_forward,
    skipping_forward,
    tiled_forward,
    _splash.splash_forward,
    q_at=0,
    operands=3,
    results=_forward_results,
)
_backward = _chosen(
    "npu_bridge.attention_form_backward", masked_backward, skipping_backward, tiled_backward, _splash.splash_backward,
    q_at=1, operands=6, results=lambda g, q, k, v, *others, **params: [q, k, v],
)  # fmt: skip


def forward(q, k, v, *ids, plan, scale, form, wide=False):
    """-> out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing).

    With `wide` out is in float32 and that lse is -inf, so that results over different keys can be merged.
    """
    more = {"wide": True} if wide else {}
    return _forward(q, k, v, *ids, plan=tuple(plan), scale=scale, form=form, **more)


def backward(g, q, k, v, out, lse, *ids, plan, scale, form):
    """-> dq, dk, dv in the dtype of q. Probabilities are computed again from lse, never stored."""
    return _backward(g, q, k, v, out, lse, *ids, plan=tuple(plan), scale=scale, form=form)
