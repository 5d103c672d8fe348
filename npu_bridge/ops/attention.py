"""Softmax attention over packed rows, with an explicit gradient that stores no probabilities.

B rows, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head dim of queries and keys,
J head dim of values (J = H but for multi-head latent attention).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

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
    lengths_kv=None,
    padding="zeros",
    implementation=None,
    return_lse=False,
):
    """Grouped-query softmax attention inside equal segment ids.

    Query position t may attend key position s when all of these hold:
      - their segment ids are equal and not 0 (with no ids given every position belongs to one segment);
      - `causal`: s <= t + (S - T), the last query being level with the last key;
      - `window`: at most window - 1 positions lie between them (t + (S - T) - s < window, and when not causal
        s - t - (S - T) < window as well).
    A query that may attend nothing yields zeros and passes no gradient, unless `padding` says that nobody looks.

    Args:
      q: (B, T, N, H). k: (B, S, K, H). v: (B, S, K, J). K divides N; query head n reads key head n // (N // K). One
        dtype.
      segment_ids_q: (B, T) int32, samples counted from 1, 0 is padding. segment_ids_kv: (B, S), by default those of the
        queries.
      window: static int or None. scale: static float, by default H ** -0.5.
      max_segment_length: static promise that equal ids span at most this many positions. It lets
        the computation skip what is always masked and changes no result; a broken promise gives wrong results.
      lengths: (B, M) int32, -1 padded: lengths of the same segments in order from the start of the row, for
        variable-length kernels. Positions past their sum are padding. The reference ignores it.
      lengths_kv: (B, M) int32, -1 padded, where keys are another stretch than the queries (one round of a ring):
        segment i of a row, counted from 1, has lengths[i - 1] queries and lengths_kv[i - 1] keys, either of which may
        be 0. Not with `causal` or `window`, whose positions are those of whole rows. By default `lengths`.
      padding: static. "zeros", or "unread": a promise that nobody reads what queries of id 0 yield and that their
        gradients are zero. Variable-length kernels then let padding attend itself, which yields some finite number and
        saves clearing it.
      implementation: the form that XLA computes (see `_forms`); the NPU has kernels of its own. None or "auto": chosen
        by platform and shape when the program is lowered. "reference" holds the scores of a row, "blocked" is linear in
        the row on any platform, "splash" are Pallas' kernels (TPU; elsewhere interpreted). "dense" and "banded" are
        plans of "auto" for tests and timings: no band, or one whatever it costs (needs max_segment_length or window).
      return_lse: return the log-sum-exp as well, and the output in float32, so that `merge_attention` can merge results
        over different keys without rounding each. Gradients flow through both. The gradient of the log-sum-exp widens
        values by 16 columns; a ring that keeps the merged output and log-sum-exp needs none, see `attention_gradients`.

    Returns:
      (B, T, N, J) in q's dtype; softmax in float32, products accumulated in float32. With `return_lse` a pair: that
      output in float32, and (B, N, T) float32, -inf for a query that attends nothing.
    """
    segments = segment_ids_q, segment_ids_kv, lengths, lengths_kv
    promises = window, max_segment_length, padding, implementation
    ids, plan, scale, form = _prepared(q, k, v, segments, bool(causal), scale, *promises)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    attend = _attention_and_lse if return_lse else _attention
    return attend(q, k, v, *ids, plan, scale, padding, form)


def attention_gradients(
    g,
    q,
    k,
    v,
    out,
    lse,
    *,
    segment_ids_q=None,
    segment_ids_kv=None,
    causal: bool,
    window=None,
    scale=None,
    max_segment_length=None,
    lengths=None,
    lengths_kv=None,
    padding="zeros",
    implementation=None,
):
    """Gradients of attention over some of the keys, from the output and log-sum-exp over all of them.

    A ring's backward pass: the probabilities of the keys of one round are exp(logit - lse), whatever the other rounds
    hold, and the row sums g * out are those of the merged output.

    Args:
      g, out: (B, T, N, J). lse: (B, N, T), -inf for a query that attends nothing. Others as for `attention`.

    Returns:
      dq, dk, dv in q's dtype, of these keys alone: sum dq over the rounds, in float32.
    """
    segments = segment_ids_q, segment_ids_kv, lengths, lengths_kv
    promises = window, max_segment_length, padding, implementation
    ids, plan, scale, form = _prepared(q, k, v, segments, bool(causal), scale, *promises)
    return _bind(1, (g, q, k, v, out, _finite(lse)), *ids, plan, scale, padding, form)


def merge_attention(a, b):
    """Merge two results of `attention(..., return_lse=True)` for the same queries over different keys.

    Args:
      a, b: pairs of out (B, T, N, J) and lse (B, N, T), both float32.

    Returns:
      The pair that attention over all of these keys gives.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    peak = lax.stop_gradient(_finite(jnp.maximum(lse_a, lse_b)))
    weight_a, weight_b = jnp.exp(lse_a - peak), jnp.exp(lse_b - peak)
    total = weight_a + weight_b
    divisor = jnp.where(total > 0, total, 1)

    def per_head(x):
        return x.transpose(0, 2, 1)[..., None]

    out = out_a * per_head(weight_a / divisor) + out_b * per_head(weight_b / divisor)
    return out, jnp.where(total > 0, peak + jnp.log(divisor), -jnp.inf)


def _finite(lse):
    """0 in place of -inf: queries that attend nothing have no probabilities either way."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def _prepared(q, k, v, segments, causal, scale, window, max_segment_length, padding, implementation):
    """Check the arguments of `attention`. Returns (ids of queries, keys; lengths of both), plan, scale, form."""
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    segment_ids_q, segment_ids_kv, lengths, lengths_kv = segments
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
        lengths is None or (segment_ids_q is not None and (queries == keys or lengths_kv is not None)),
        "attention",
        "lengths describe the segments of self-attention; pass segment_ids_q as well, and as many keys as queries or "
        "lengths_kv",
    )
    require(
        lengths_kv is None or (lengths is not None and lengths.shape == lengths_kv.shape),
        "attention",
        "lengths_kv stand beside lengths of the queries, of one shape",
    )
    require(
        lengths_kv is None or (not causal and window is None),
        "attention",
        "lengths_kv with causal or window: positions are those of whole rows, which lengths do not tell",
    )
    require(padding in ("zeros", "unread"), "attention", f"padding is {padding!r}; expected 'zeros' or 'unread'")
    return (segment_ids_q, segment_ids_kv, lengths, lengths_kv), plan, scale, form


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


def attention_forward(q, k, v, *segments, causal, window, scale, blocks, padding="zeros", form="auto", wide=False):
    """-> out (B, T, N, J), lse (B, N, T) float32; with `wide` out in float32 and lse -inf where nothing is attended.

    `segments` is empty, or ids of queries and keys, or those and run lengths.
    """
    plan = Plan(causal, window, *blocks)
    return _forms.forward(q, k, v, *segments[:2], plan=plan, scale=scale, form=form, wide=wide)


def attention_backward(g, q, k, v, out, lse, *segments, causal, window, scale, blocks, padding="zeros", form="auto"):
    """-> dq, dk, dv."""
    return _forms.backward(
        g, q, k, v, out, lse, *segments[:2], plan=Plan(causal, window, *blocks), scale=scale, form=form
    )


_Q, _K, _V, _OUT, _LSE = "b t (n g) h", "b s n h", "b s n j", "b t (n g) j", "b (n g) t"
_REPLICATE = ("t", "s", "g", "h", "j", "m")  # rows and key heads may be sharded


def _forward_results(q, k, v, *segments, wide=False, **plan):
    batch, positions, heads, _ = q.shape
    return [
        jax.ShapeDtypeStruct((batch, positions, heads, v.shape[-1]), accumulator(q.dtype) if wide else q.dtype),
        jax.ShapeDtypeStruct((batch, heads, positions), accumulator(q.dtype)),
    ]


def _define(suffix, segments, host=()):
    def heads_a_group(operands, results, **params):
        q, k = (operands[0], operands[1]) if len(operands) < 6 + len(segments) else (operands[1], operands[2])
        return {"g": q.shape[2] // k.shape[2]}

    forward = define_operator(
        "attention" + suffix,
        reference=attention_forward,
        replicate=_REPLICATE,
        sizes=heads_a_group,
        rule=f"{', '.join((_Q, _K, _V, *segments))} -> {_OUT}, {_LSE}",
        host_operands=tuple(3 + i for i in host),
        reference_only=("form",),
        results=_forward_results,
    )
    backward = define_operator(
        "attention" + suffix + "_backward",
        reference=attention_backward,
        replicate=_REPLICATE,
        sizes=heads_a_group,
        rule=f"{', '.join((_OUT, _Q, _K, _V, _OUT, _LSE, *segments))} -> {_Q}, {_K}, {_V}",
        host_operands=tuple(6 + i for i in host),
        reference_only=("form",),
        results=lambda g, q, k, v, *others, **plan: [q, k, v],
    )
    return forward, backward


# One pair of operators for each set of operands: no segments, segment ids, segment ids with their run lengths on the
# host, and run lengths of queries and keys apart.
_OPERATORS = {
    0: _define("", ()),
    2: _define("_segments", ("b t", "b s")),
    3: _define("_packed", ("b t", "b s", "b m"), (2,)),
    4: _define("_ring", ("b t", "b s", "b m", "b m"), (2, 3)),
}


def _bind(which, arrays, ids_q, ids_kv, lengths, lengths_kv, plan, scale, padding, form, **more):
    segments = [x for x in (ids_q, ids_kv, lengths, lengths_kv) if x is not None]
    operator = _OPERATORS[len(segments)][which]
    return operator(
        *arrays,
        *segments,
        causal=plan.causal,
        window=plan.window,
        scale=scale,
        blocks=tuple(plan[2:]),
        padding=padding,
        form=form,
        **more,
    )


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attention(q, k, v, ids_q, ids_kv, lengths, lengths_kv, *static):
    return _bind(0, (q, k, v), ids_q, ids_kv, lengths, lengths_kv, *static)[0]


def _attention_fwd(q, k, v, ids_q, ids_kv, lengths, lengths_kv, *static):
    out, lse = _bind(0, (q, k, v), ids_q, ids_kv, lengths, lengths_kv, *static)
    return out, (q, k, v, ids_q, ids_kv, lengths, lengths_kv, out, lse)


def _attention_bwd(plan, scale, padding, form, res, g):
    q, k, v, *segments, out, lse = res
    grads = _bind(1, (g, q, k, v, out, lse), *segments, plan, scale, padding, form)
    return (*grads, *(None if ids is None else zero_cotangent(ids) for ids in segments))


_attention.defvjp(_attention_fwd, _attention_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attention_and_lse(q, k, v, ids_q, ids_kv, lengths, lengths_kv, *static):
    return _bind(0, (q, k, v), ids_q, ids_kv, lengths, lengths_kv, *static, wide=True)


def _attention_and_lse_fwd(q, k, v, ids_q, ids_kv, lengths, lengths_kv, *static):
    out, lse = _bind(0, (q, k, v), ids_q, ids_kv, lengths, lengths_kv, *static, wide=True)
    return (out, lse), (q, k, v, ids_q, ids_kv, lengths, lengths_kv, out, lse)


COLUMNS = 16  # what kernels want head dims to be multiples of


def _attention_and_lse_bwd(plan, scale, padding, form, res, gradients):
    """The gradient of the log-sum-exp adds h * p to that of the logits, p * (g . v - g . out).

    Kernels take it as one more column: h in g, 1 in v, 0 in out. Queries and keys are padded with zeros to the same
    width, because torch's and torch_npu's kernels want values no wider than keys.
    """
    q, k, v, *segments, out, lse = res
    g, h = gradients
    h = jnp.where(lse == -jnp.inf, 0, h).transpose(0, 2, 1)[..., None]
    width = -(-(v.shape[-1] + 1) // COLUMNS) * COLUMNS

    def widen(x):
        return jnp.pad(x, [(0, 0)] * 3 + [(0, max(0, width - x.shape[-1]))])

    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    g, wide_v = widen(jnp.concatenate([g, h], -1)), widen(jnp.concatenate([v, ones], -1))
    dq, dk, dv = _bind(
        1, (g, widen(q), widen(k), wide_v, widen(out), _finite(lse)), *segments, plan, scale, padding, form
    )
    grads = dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
    return (*grads, *(None if ids is None else zero_cotangent(ids) for ids in segments))


_attention_and_lse.defvjp(_attention_and_lse_fwd, _attention_and_lse_bwd)
