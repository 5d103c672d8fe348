"""Attention that returns its log-sum-exp: against a formula in float64, and merged over stretches of keys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import npu_bridge
from npu_bridge import ops
from tests.bridge.harness import call_three_times

B, T, S, N, K, H, J = 2, 24, 40, 4, 2, 8, 6
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


Q, KEYS, VALUES = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, J)
IDS_Q = np.array([[2] * 9 + [3] * 10 + [0] * 5, [1] * 20 + [4] * 4], np.int32)  # nobody has id 4
IDS_KV = np.array([[1] * 7 + [2] * 20 + [3] * 6 + [0] * 7, [1] * 30 + [2] * 10], np.int32)
LENGTHS = np.array([[0, 9, 10, 0], [20, 0, 0, 4]], np.int32), np.array([[7, 20, 6, 0], [30, 10, 0, 0]], np.int32)


def formula(q, k, v, allowed):
    """Softmax in float64: out (B, T, N, J) and lse (B, N, T), written with whole matrices."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    logits = jnp.where(allowed[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5, -1e300)
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(allowed[:, None], jnp.exp(logits - peak), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnj->btnj", weights / jnp.where(total > 0, total, 1), v)
    return out, jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)[..., 0]


def weigh(attend, *arrays):
    """A number that reads both results: gradients flow through out and through the log-sum-exp where there is one."""
    out, lse = attend(*arrays)
    wave = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    ripple = jnp.sin(jnp.arange(lse.size, dtype=out.dtype)).reshape(lse.shape)
    return (out * wave).sum() + jnp.where(lse > -jnp.inf, lse * ripple, 0).sum(), (out, lse)


def values_and_gradients(attend):
    def run(*arrays):
        (_, results), grads = jax.value_and_grad(partial(weigh, attend), argnums=(0, 1, 2), has_aux=True)(*arrays)
        return *results, *grads

    return run


def exact(allowed, *arrays):
    """Values and gradients of the formula in float64, by JAX's own differentiation."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        allowed = jnp.asarray(allowed)
        return [np.asarray(x) for x in values_and_gradients(lambda q, k, v: formula(q, k, v, allowed))(*arrays)]


def worst(wanted, found):
    """Largest difference of each array, relative to its largest value; infinite numbers have to agree."""
    gaps = []
    for a, b in zip(wanted, found, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.array_equal(np.isneginf(a), np.isneginf(b)), "queries that attend nothing"
        real = np.isfinite(a)
        gaps.append(np.abs(a[real] - b[real]).max() / np.abs(a[real]).max())
    return max(gaps)


ALLOWED = (IDS_Q[:, :, None] == IDS_KV[:, None]) & (IDS_Q != 0)[:, :, None]
WITH_IDS = dict(segment_ids_q=IDS_Q, segment_ids_kv=IDS_KV, causal=False, return_lse=True)


@pytest.mark.parametrize("form", ["reference", "blocked", "splash"])
def test_output_and_log_sum_exp_and_gradients_through_both_equal_the_formula_on_xla(form):
    arrays, allowed, how = (Q, KEYS, VALUES), ALLOWED, dict(WITH_IDS, implementation=form)
    if form == "splash":  # no shorter rows than one block of the kernels
        arrays = normal(1, 128, N, H), normal(1, 128, K, H), normal(1, 128, K, J)
        ids = np.array([[1] * 50 + [2] * 70 + [0] * 8], np.int32)
        how |= dict(segment_ids_q=ids, segment_ids_kv=ids)
        allowed = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
    run = jax.jit(values_and_gradients(lambda q, k, v: ops.attention(q, k, v, **how)))
    gap = worst(exact(allowed, *arrays), run(*arrays))
    assert gap < 5e-6, f"{form}: relative difference {gap:.1e}"  # float32


def test_tiles_that_are_skipped_leave_minus_infinity():
    ids = np.repeat(np.array([[1] * 300 + [2] * 100 + [0] * 112], np.int32), 2, 0)
    arrays = normal(2, 512, 4, H), normal(2, 512, 2, H), normal(2, 512, 2, J)
    run = jax.jit(
        values_and_gradients(lambda q, k, v: ops.attention(q, k, v, segment_ids_q=ids, causal=True, return_lse=True))
    )
    assert "while" in run.lower(*arrays).as_text(), "the form that skips"
    allowed = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None] & np.tri(512, dtype=bool)
    gap = worst(exact(allowed, *arrays), run(*arrays))
    assert gap < 5e-6, f"relative difference {gap:.1e}"


@pytest.mark.parametrize("lengths", [False, True], ids=["ids", "lengths of queries and keys"])
def test_the_bridge_gives_what_the_formula_gives_in_every_call(lengths):
    how = WITH_IDS | (dict(lengths=LENGTHS[0], lengths_kv=LENGTHS[1]) if lengths else {})
    fn = values_and_gradients(lambda q, k, v: ops.attention(q, k, v, **how))
    compiled = call_three_times(fn, Q, KEYS, VALUES, rtol=1e-4, atol=2e-6)
    gap = worst(exact(ALLOWED, Q, KEYS, VALUES), jax.tree.map(np.asarray, compiled(Q, KEYS, VALUES)))
    assert gap < 5e-6, f"relative difference {gap:.1e}"
    names = {call["name"] for call in compiled.lower(Q, KEYS, VALUES).kernels()}
    form = "ring" if lengths else "segments"
    assert names == {f"npu_bridge.attention_{form}", f"npu_bridge.attention_{form}_backward"}, names


def test_the_output_is_not_rounded_to_the_dtype_of_the_queries():
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (Q, KEYS, VALUES)]
    wanted = exact(ALLOWED, *(np.asarray(x, np.float32) for x in narrow))[:2]
    for where, run in (("XLA", jax.jit), ("bridge", npu_bridge.jit)):
        out, lse = run(lambda q, k, v: ops.attention(q, k, v, **WITH_IDS))(*narrow)
        out, lse = np.asarray(out), np.asarray(lse)
        assert out.dtype == np.float32
        assert not np.array_equal(out, np.asarray(jnp.asarray(out).astype(jnp.bfloat16), np.float32)), where
        gap = worst(wanted, (out, lse))
        assert gap < 4e-3, f"{where}: {gap:.1e}"  # probabilities are rounded to bfloat16 once


def test_results_over_two_stretches_of_keys_merge_into_the_result_over_all():
    def merged(q, k, v):
        parts = [
            ops.attention(q, k[:, a:b], v[:, a:b], **(WITH_IDS | {"segment_ids_kv": IDS_KV[:, a:b]}))
            for a, b in ((0, 12), (12, S))
        ]
        return ops.merge_attention(*parts)

    gap = worst(exact(ALLOWED, Q, KEYS, VALUES), jax.jit(values_and_gradients(merged))(Q, KEYS, VALUES))
    assert gap < 5e-6, f"relative difference {gap:.1e}"


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lengths_kv with causal or window"):
        ops.attention(Q, KEYS, VALUES, **(WITH_IDS | {"causal": True}), lengths=LENGTHS[0], lengths_kv=LENGTHS[1])
    with pytest.raises(ValueError, match="lengths_kv stand beside lengths"):
        ops.attention(Q, KEYS, VALUES, **WITH_IDS, lengths_kv=LENGTHS[1])
