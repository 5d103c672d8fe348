"""jax.lax.ragged_dot through the bridge: one product a group, not a masked product of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import npu_bridge
from tests.bridge.harness import CALLS, assert_close, call_three_times, fresh_arguments

ROWS, WIDTH, OUT, GROUPS = 24, 8, 6, 4
R = np.random.RandomState(0)
X = R.normal(size=(ROWS, WIDTH)).astype(np.float32)
W = R.normal(size=(GROUPS, WIDTH, OUT)).astype(np.float32)
SIZES = np.array([5, 0, 11, 4], np.int32)  # four rows belong to nobody
WAVE = np.cos(np.arange(ROWS * OUT, dtype=np.float32)).reshape(ROWS, OUT)
NAMES = ["grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_weight_gradient"]


def step(x, w):
    y, pull = jax.vjp(lambda x, w: lax.ragged_dot(x, w, jnp.asarray(SIZES)), x, w)
    return y, *pull(WAVE.astype(y.dtype))


def kernels(low):
    return sorted(call["name"].removeprefix("npu_bridge.") for call in low.kernels())


def by_hand(x, w):
    ends = np.cumsum(SIZES)
    y, dx, dw = np.zeros((ROWS, OUT)), np.zeros((ROWS, WIDTH)), np.zeros(w.shape)
    for e, (a, b) in enumerate(zip(ends - SIZES, ends)):
        y[a:b], dx[a:b], dw[e] = x[a:b] @ w[e], WAVE[a:b] @ w[e].T, x[a:b].T @ WAVE[a:b]
    return [a.astype(np.float32) for a in (y, dx, dw)]


def test_values_and_gradients_are_grouped_products():
    low = call_three_times(step, X, W, rtol=1e-5, atol=1e-5).lower(X, W)
    assert kernels(low) == NAMES and "dot_general" not in low.source.operations, low.source.operations
    assert_close(by_hand(X, W), jax.tree.map(np.asarray, npu_bridge.jit(step)(X, W)), 1e-5, 1e-5, "by hand")


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16_rounds_once_or_gives_the_wider_result(preferred):
    def product(x, w):
        return lax.ragged_dot(x, w, jnp.asarray(SIZES), preferred_element_type=preferred)

    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (X, W))
    y = np.asarray(npu_bridge.jit(product)(x, w))
    assert y.dtype == (preferred or jnp.bfloat16)
    exact, *_ = by_hand(np.asarray(x, np.float64), np.asarray(w, np.float64))
    gap = np.abs(y.astype(np.float32) - exact).max() / np.abs(exact).max()
    assert gap < (1e-6 if preferred else 4e-3), f"relative difference {gap:.1e}"


def test_batches_of_ragged_products_keep_the_form_of_jax():
    x, w = np.stack([X, X[::-1]]), np.stack([W, W * 2])
    sizes = np.stack([SIZES, SIZES[::-1]])
    call_three_times(lambda x, w: jax.vmap(lax.ragged_dot)(x, w, jnp.asarray(sizes)), x, w, rtol=1e-5, atol=1e-5)


def test_each_device_multiplies_its_own_rows_in_a_shard_map(pool):
    def inside(x, w, sizes):
        y, pull = jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes[0]), x, w)
        dx, dw = pull(jnp.cos(y))
        return y, dx, lax.psum(dw, "x")

    ins, outs = (P("x"), P(), P("x")), (P("x"), P("x"), P())

    def sharded(*a):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(inside, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)(*a)

    sizes = np.array([[2, 0, 3, 1], [6, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 2]], np.int32)
    calls = [(*fresh_arguments((X, W), n), sizes) for n in range(CALLS)]
    low = npu_bridge.jit(sharded, mesh={"x": 4}, in_shardings=ins, out_shardings=outs).lower(*calls[0])
    assert kernels(low) == NAMES
    assert [e["kind"] for e in low.collectives()] == ["all_reduce"], "of the weights' gradient alone"
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        want = [jax.tree.map(np.asarray, jax.jit(sharded)(*a)) for a in calls]
    for rank, results in enumerate(pool.calls(low, calls)):
        for call, (a, b) in enumerate(zip(want, results, strict=True)):
            assert_close(a, b, 1e-5, 1e-5, f"rank {rank}, call {call}")
