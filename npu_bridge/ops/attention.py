"""Softmax attention over packed rows, with an explicit gradient that stores no probabilities.

B rows, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head dim of queries and keys,
J head dim of values (J = H but for multi-head latent attention).
"""

from functools import partial

import jax
import jax.numpy as jnp

from npu_bridge.jaxcompat import define_operator
from npu_bridge.ops import _forms
from npu_bridge.ops._blocked import Plan, plan_blocks
from npu_bridge.ops._common import accumulator, require, require_float, zero_cotangent

describe_attention = _forms.describe


def attention(
    q,
    k,
    v,
    *,
    segment_ids_q=None,
    segment_ids_kv=None,
    causal: bool,
    window=None,
    scale=None,
    max_segment_length=None,
    lengths=None,
    padding="zeros",
    implementation=None,
):
    """Grouped-query softmax attention inside equal segment ids.

    Query place t may attend key place s when all of these hold:
      - their segment ids are equal and not 0 (with no ids given every place belongs to one segment);
      - `causal`: s <= t + (S - T), the last query being level with the last key;
      - `window`: at most window - 1 places lie between them (t + (S - T) - s < window, and when not causal
        s - t - (S - T) < window as well).
    A query that may attend nothing yields zeros and passes no gradient, unless `padding` says that nobody looks.

    Args:
      q: (B, T, N, H). k: (B, S, K, H). v: (B, S, K, J). K divides N; query head n reads key head n // (N // K). One
        dtype.
      segment_ids_q: (B, T) int32, samples counted from 1, 0 is padding. segment_ids_kv: (B, S), by default those of the
        queries.
      window: static int or None. scale: static float, by default H ** -0.5.
      max_segment_length: static promise that equal ids never lie further apart than this many places, ends included. It
        lets the computation skip what can only be masked; it changes no result, but a broken promise gives wrong
        results.
      lengths: (B, M) int32, -1 padded: lengths of the same segments in order from the start of the row, for
        variable-length kernels; only self-attention has them. Places past their sum are padding. The reference ignores
        it.
      padding: static. "zeros", or "unread": a promise that nobody reads what queries of id 0 yield and that their
        gradients are zero. Variable-length kernels then let padding attend itself, which yields some finite number and
        saves clearing it.
      implementation: the form that XLA computes (see `_forms`); the NPU has kernels of its own. None or "auto": chosen
        by platform and shape when the program is lowered. "reference" holds the scores of a row, "blocked" is linear in
        the row on any platform, "splash" are Pallas' kernels (TPU; elsewhere interpreted). "dense" and "banded" are
        plans of "auto" for tests and timings: no band, or one whatever it costs (needs max_segment_length or window).

    Returns:
      (B, T, N, J) in q's dtype; softmax in float32, products accumulated in float32.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    require_float("attention", q=q, k=k, v=v)
    _check(q, k, v, segment_ids_q, segment_ids_kv, window, max_segment_length, lengths)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if segment_ids_q is not None or segment_ids_kv is not None:
        if segment_ids_q is None:
            segment_ids_q = jnp.ones((batch, queries), jnp.int32)
        if segment_ids_kv is None:
            require(
                queries == keys,
                "attention",
                f"segment_ids_q alone serves self-attention, but there are {queries} queries and {keys} "
                "keys; pass segment_ids_kv",
            )
            segment_ids_kv = segment_ids_q
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    require(
        implementation in (None, "dense", "banded", *_forms.FORMS),
        "attention",
        f"implementation is {implementation!r}; expected None, 'dense', 'banded' or one of "
        f"{', '.join(map(repr, _forms.FORMS))}",
    )
    form = implementation if implementation in _forms.FORMS else "auto"
    banded = implementation if implementation in ("dense", "banded") else None
    plan = plan_blocks(
        queries, keys, causal=bool(causal), window=window, max_segment_length=max_segment_length, implementation=banded
    )
    require(
        lengths is None or (segment_ids_q is not None and queries == keys),
        "attention",
        "lengths describe the segments of self-attention; pass segment_ids_q as well, and as many keys as queries",
    )
    require(padding in ("zeros", "unread"), "attention", f"padding is {padding!r}; expected 'zeros' or 'unread'")
    return _attention(q, k, v, segment_ids_q, segment_ids_kv, lengths, plan, scale, padding, form)


def _check(q, k, v, segment_ids_q, segment_ids_kv, window, max_segment_length, lengths):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    require(
        q.ndim == k.ndim == v.ndim == 4, "attention", f"{shapes}; expected (B, T, N, H), (B, S, K, H), (B, S, K, J)"
    )
    require(
        q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3],
        "attention",
        f"{shapes}; B, S or K differ",
    )
    require(q.shape[-1] == k.shape[-1], "attention", f"{shapes}; queries and keys need one head dim")
    require(
        q.shape[2] % k.shape[2] == 0,
        "attention",
        f"{shapes}; {k.shape[2]} key heads do not divide {q.shape[2]} query heads",
    )
    require(q.dtype == k.dtype == v.dtype, "attention", f"dtypes are {q.dtype}, {k.dtype}, {v.dtype}; expected one")
    for name, ids, shape in (
        ("segment_ids_q", segment_ids_q, q.shape[:2]),
        ("segment_ids_kv", segment_ids_kv, k.shape[:2]),
    ):
        require(
            ids is None or (ids.shape == shape and jnp.issubdtype(ids.dtype, jnp.integer)),
            "attention",
            f"{name} is {None if ids is None else (ids.dtype, ids.shape)}; expected integers of shape {shape}",
        )
    for name, value in (("window", window), ("max_segment_length", max_segment_length)):
        require(value is None or value >= 1, "attention", f"{name} is {value}; expected at least 1")
    require(
        lengths is None or (lengths.ndim == 2 and lengths.shape[0] == q.shape[0]),
        "attention",
        f"lengths have shape {None if lengths is None else lengths.shape}; expected ({q.shape[0]}, M)",
    )


def attention_forward(q, k, v, *segments, causal, window, scale, blocks, padding="zeros", form="auto"):
    """-> out (B, T, N, J), lse (B, N, T) float32.

    `segments` is empty, or ids of queries and keys, or those and run lengths.
    """
    return _forms.forward(q, k, v, *segments[:2], plan=Plan(causal, window, *blocks), scale=scale, form=form)


def attention_backward(g, q, k, v, out, lse, *segments, causal, window, scale, blocks, padding="zeros", form="auto"):
    """-> dq, dk, dv."""
    return _forms.backward(
        g, q, k, v, out, lse, *segments[:2], plan=Plan(causal, window, *blocks), scale=scale, form=form
    )


_Q, _K, _V, _OUT, _LSE = "b t (n g) h", "b s n h", "b s n j", "b t (n g) j", "b (n g) t"
_REPLICATE = ("t", "s", "g", "h", "j", "m")  # rows and key heads may be sharded


def _forward_results(q, k, v, *segments, **plan):
    batch, places, heads, _ = q.shape
    return [
        jax.ShapeDtypeStruct((batch, places, heads, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, places), accumulator(q.dtype)),
    ]


def _define(suffix, segments, host):
    def heads_a_group(operands, results, **params):
        q, k = (operands[0], operands[1]) if len(operands) < 6 + len(segments) else (operands[1], operands[2])
        return {"g": q.shape[2] // k.shape[2]}

    forward = define_operator(
        "attention" + suffix,
        reference=attention_forward,
        replicate=_REPLICATE,
        sizes=heads_a_group,
        rule=f"{', '.join((_Q, _K, _V, *segments))} -> {_OUT}, {_LSE}",
        host_operands=(5,) if host else (),
        reference_only=("form",),
        results=_forward_results,
    )
    backward = define_operator(
        "attention" + suffix + "_backward",
        reference=attention_backward,
        replicate=_REPLICATE,
        sizes=heads_a_group,
        rule=f"{', '.join((_OUT, _Q, _K, _V, _OUT, _LSE, *segments))} -> {_Q}, {_K}, {_V}",
        host_operands=(8,) if host else (),
        reference_only=("form",),
        results=lambda g, q, k, v, *others, **plan: [q, k, v],
    )
    return forward, backward


# One pair of operators for each set of operands: no segments, segment ids, segment ids with their run lengths on the
# host.
_OPERATORS = [
    _define("", (), False),
    _define("_segments", ("b t", "b s"), False),
    _define("_packed", ("b t", "b s", "b m"), True),
]


def _bind(which, arrays, ids_q, ids_kv, lengths, plan, scale, padding, form):
    segments = () if ids_q is None else (ids_q, ids_kv) if lengths is None else (ids_q, ids_kv, lengths)
    operator = _OPERATORS[(0, None, 1, 2)[len(segments)]][which]
    return operator(
        *arrays,
        *segments,
        causal=plan.causal,
        window=plan.window,
        scale=scale,
        blocks=tuple(plan[2:]),
        padding=padding,
        form=form,
    )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, ids_q, ids_kv, lengths, plan, scale, padding, form):
    return _bind(0, (q, k, v), ids_q, ids_kv, lengths, plan, scale, padding, form)[0]


def _attention_fwd(q, k, v, ids_q, ids_kv, lengths, plan, scale, padding, form):
    out, lse = _bind(0, (q, k, v), ids_q, ids_kv, lengths, plan, scale, padding, form)
    return out, (q, k, v, ids_q, ids_kv, lengths, out, lse)


def _attention_bwd(plan, scale, padding, form, res, g):
    q, k, v, *segments, out, lse = res
    grads = _bind(1, (g, q, k, v, out, lse), *segments, plan, scale, padding, form)
    return (*grads, *(None if ids is None else zero_cotangent(ids) for ids in segments))


_attention.defvjp(_attention_fwd, _attention_bwd)
