"""Ring attention by shard_map and ppermute: on four XLA devices and on four processes of the bridge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge import ops
from tests.bridge.harness import CALLS, fresh_arguments

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def worst(wanted, found):
    """Largest difference of each array, relative to its largest value."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(wanted, found, strict=True)]
    return max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(q, k, v, ids, size):
    """Causal attention over the shards of axis "x", on one device; rounds of later keys do not run."""
    return _ring_forward(q, k, v, ids, size)[0]


def _turn(tree, size):
    return jax.tree.map(lambda x: lax.ppermute(x, "x", [(i, (i + 1) % size) for i in range(size)]), tree)


def _rounds(size, one_round, carried, moving):
    """`one_round(carried, moving, r)` for the device's own shard and the shards of those before it."""
    me = lax.axis_index("x")
    for r in range(size):
        if r:
            moving = _turn(moving, size)
        see = lax.cond if r else (lambda _, run, skip, c, m: run(c, m))
        carried, moving = see(r <= me, partial(one_round, r == 0), lambda c, m: (c, m), carried, moving)
    return carried, moving


def _how(ids, other, own):
    return dict(segment_ids_q=ids, segment_ids_kv=other, causal=own)


def _ring_forward(q, k, v, ids, size):
    def one(own, merged, moving):
        k, v, other = moving
        part = ops.attention(q, k, v, return_lse=True, **_how(ids, other, own))
        return ops.merge_attention(merged, part), moving

    empty = jnp.zeros(q.shape[:3] + v.shape[-1:]), jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf)
    (out, lse), _ = _rounds(size, one, empty, (k, v, ids))
    return out.astype(q.dtype), (q, k, v, ids, out, lse)


def _ring_backward(size, saved, g):
    q, k, v, ids, out, lse = saved

    def one(own, dq, moving):
        k, v, other, dk, dv = moving
        parts = ops.attention_gradients(g, q, k, v, out, lse, **_how(ids, other, own))
        a, b, c = (x.astype(jnp.float32) for x in parts)
        return dq + a, (k, v, other, dk + b, dv + c)

    zeros = [jnp.zeros(x.shape) for x in (q, k, v)]
    dq, (*_, dk, dv) = _rounds(size, one, zeros[0], (k, v, ids, *zeros[1:]))
    dk, dv = _turn((dk, dv), size)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), np.zeros(ids.shape, jax.dtypes.float0)


ring.defvjp(_ring_forward, _ring_backward)

B, ROW, N, K, H, J, SIZE = 2, 64, 4, 2, 8, 6, 4
RING = normal(B, ROW, N, H), normal(B, ROW, K, H), normal(B, ROW, K, J), normal(B, ROW, N, J)
RING_IDS = np.array([[1] * 10 + [2] * 37 + [3] * 12 + [0] * 5, [1] * 64], np.int32)
CUT = P(None, "x")


def ring_step(q, k, v, w, ids):
    """Output and gradients of a weighted sum of it."""
    mapped = jax.shard_map(
        lambda *a: ring(*a, SIZE),
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=(CUT,) * 4,
        out_specs=CUT,
        check_vma=False,
    )
    out, pull = jax.vjp(lambda q, k, v: mapped(q, k, v, ids), q, k, v)
    return out, *pull(w)


def whole_step(q, k, v, w, ids):
    out, pull = jax.vjp(lambda q, k, v: ops.attention(q, k, v, segment_ids_q=ids, causal=True), q, k, v)
    return out, *pull(w)


@pytest.fixture(scope="module")
def rings():
    """Arguments of three calls and what attention over the whole row gives for each."""
    calls = [(*fresh_arguments(RING, n), RING_IDS) for n in range(CALLS)]
    return calls, [[np.asarray(x) for x in jax.jit(whole_step)(*a)] for a in calls]


def test_a_ring_on_four_xla_devices_equals_attention_over_the_whole_row(rings):
    mesh = jax.make_mesh((SIZE,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SIZE])
    with jax.set_mesh(mesh):
        run = jax.jit(ring_step, in_shardings=(NamedSharding(mesh, CUT),) * 5)
        for arguments, wanted in zip(*rings, strict=True):
            gap = worst(wanted, run(*arguments))
            assert gap < 2e-6, f"relative difference {gap:.1e}"
        # 3 turns of k, v, ids; 3 of those with their gradients, which then go home.
        assert run.lower(*rings[0][0]).as_text().count("collective_permute") == 3 * 3 + 3 * 5 + 2


def test_a_ring_on_four_processes_of_the_bridge_equals_attention_over_the_whole_row(rings, pool):
    low = npu_bridge.jit(ring_step, mesh={"x": SIZE}, in_shardings=(CUT,) * 5, out_shardings=(CUT,) * 4).lower(
        *RING, RING_IDS
    )
    calls, wanted = rings
    for rank, results in enumerate(pool.calls(low, calls)):
        for call, (want, got) in enumerate(zip(wanted, results, strict=True)):
            gap = worst(want, got)
            assert gap < 2e-6, f"rank {rank}, call {call}: relative difference {gap:.1e}"
    exchanges = low.collectives()
    # The backward pass turns k, v and ids as the forward pass does: equal exchanges of one block are shared.
    assert {e["kind"] for e in exchanges} == {"permute"} and len(exchanges) == 3 * 3 + 3 * 2 + 2
    # Every round is one kernel each way, in a branch of its own but for the first.
    names = [call["name"].removeprefix("npu_bridge.") for call in low.kernels()]
    assert names.count("attention_segments") == names.count("attention_segments_backward") == SIZE
    assert low.as_text().count("if ") == 2 * (SIZE - 1), "rounds of later keys do not run"
    assert "rt.permute(" not in low.as_text() and not any(e["waits"] for e in exchanges), "turns beside the computation"
