"""Attention over every pair of places: the plain form that the block-banded one and the kernels must equal.

B rows, T query places, S key places, N query heads, K key/value heads, G = N / K, H and J head dims.
Inside, the G query heads that share a key head lie side by side as G * T rows, so each product is one matrix product a key head.
"""

import jax.numpy as jnp
from jax import lax

from npu_bridge.ops._common import accumulator, einsum


def allowed(queries, keys, ids_q, ids_kv, *, causal, window):
    """(B or 1, T, S) bool, True where query t may attend key s; None when nothing is forbidden."""
    ahead = lax.broadcasted_iota(jnp.int32, (1, queries, keys), 1) + (keys - queries) - lax.broadcasted_iota(jnp.int32, (1, queries, keys), 2)
    tests = []
    if causal:
        tests.append(ahead >= 0)
    if window is not None:
        tests.append(ahead < window)
        if not causal:
            tests.append(ahead > -window)
    if ids_q is not None:
        tests.append((ids_q[:, :, None] == ids_kv[:, None, :]) & (ids_q != 0)[:, :, None])
    mask = None
    for test in tests:
        mask = test if mask is None else mask & test
    return mask


def by_key_head(x, key_heads):
    """(B, T, N, H) -> (B, K, G, T, H)."""
    batch, places, heads, dim = x.shape
    return x.reshape(batch, places, key_heads, heads // key_heads, dim).transpose(0, 2, 3, 1, 4)


def by_place(x):
    """(B, K, G, T, H) -> (B, T, N, H)."""
    batch, key_heads, group, places, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, places, key_heads * group, dim)


def dense_forward(q, k, v, ids_q, ids_kv, *, causal, window, scale):
    """-> out (B, T, N, J) in q's dtype, lse (B, N, T) in float32 (0 for a query that attends nothing)."""
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    logits = einsum("bkgth,bskh->bkgts", by_key_head(q, key_heads), k) * scale
    mask = allowed(queries, keys, ids_q, ids_kv, causal=causal, window=window)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    peak = jnp.max(logits, -1, keepdims=True)
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, -1, keepdims=True)
    alive = total > 0
    out = einsum("bkgts,bskj->bkgtj", weights.astype(q.dtype), v) / jnp.where(alive, total, 1)
    lse = jnp.where(alive, peak + jnp.log(jnp.where(alive, total, 1)), 0)
    return by_place(out.astype(q.dtype)), lse[..., 0].reshape(batch, heads, queries)


def dense_backward(g, q, k, v, ids_q, ids_kv, out, lse, *, causal, window, scale):
    """-> dq, dk, dv in the dtype of q. Probabilities are computed again from lse."""
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    dtype = accumulator(q.dtype)
    qk, gk = by_key_head(q, key_heads), by_key_head(g.astype(q.dtype), key_heads)
    delta = jnp.sum(by_key_head(g.astype(dtype) * out.astype(dtype), key_heads), -1, keepdims=True)
    logits = einsum("bkgth,bskh->bkgts", qk, k) * scale
    mask = allowed(queries, keys, ids_q, ids_kv, causal=causal, window=window)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    p = jnp.exp(logits - lse.reshape(batch, key_heads, heads // key_heads, queries, 1))
    dp = einsum("bkgtj,bskj->bkgts", gk, v)
    ds = (p * (dp - delta) * scale).astype(q.dtype)
    dv = einsum("bkgts,bkgtj->bskj", p.astype(q.dtype), gk)
    dq = einsum("bkgts,bskh->bkgth", ds, k)
    dk = einsum("bkgts,bkgth->bskh", ds, qk)
    return by_place(dq.astype(q.dtype)), dk.astype(k.dtype), dv.astype(v.dtype)
