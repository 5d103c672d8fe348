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


# ---- ragged_all_to_all, against numpy: XLA has none on a CPU
# ----------------------------------------------------------------------------------------------------------------

PLACES, SEND, RECEIVE = 4, 8, 10


def _runs(seed: int, per_place: int = 1):
    """Random runs: for each sender the offsets and sizes by receiver, and where they begin there."""
    rng = np.random.RandomState(seed)
    shape = (PLACES, PLACES * per_place)
    sizes = rng.randint(0, SEND // (PLACES * per_place) + 1, shape)
    begins = np.stack([rng.permutation(shape[1]) for _ in range(PLACES)]) * (SEND // shape[1])
    by_receiver = sizes.reshape(PLACES, PLACES, per_place)
    targets = np.cumsum(by_receiver.transpose(1, 0, 2).reshape(PLACES, -1), 1) + 1
    targets -= by_receiver.transpose(1, 0, 2).reshape(PLACES, -1)
    targets = targets.reshape(PLACES, PLACES, per_place).transpose(1, 0, 2).reshape(shape)
    received = by_receiver.transpose(1, 0, 2).reshape(shape)
    return [a.astype(np.int32) for a in (begins, sizes, targets, received)]


def _exchanged(x, out, begins, sizes, targets, received):
    got, count = out.copy(), begins.shape[1] // PLACES
    for source in range(PLACES):
        for n in range(begins.shape[1]):
            b, s, t = begins[source, n], sizes[source, n], targets[source, n]
            got[n // count, t : t + s] = x[source, b : b + s]
    return got


@pytest.mark.parametrize("per_place", [1, 2], ids=["one run", "two runs"])
@pytest.mark.parametrize("exact", [False, True], ids=["no host", "host reads lengths"])
@pytest.mark.parametrize("axes", [("x", "y"), ("y", "x")], ids=["in order", "permuted"])
def test_runs_arrive_where_their_sender_says(pool, axes, exact, per_place):
    spec = P(axes)

    def body(x, out, *runs):
        return lax.ragged_all_to_all(x[0], out[0], *(r[0] for r in runs), axis_name=axes)[None]

    def step(x, out, *runs):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False)(x, out, *runs)

    def arguments(call):
        rng = np.random.RandomState(call)
        x, out = (rng.normal(size=(PLACES, n, 3)).astype(np.float32) for n in (SEND, RECEIVE))
        return [x, out, *_runs(call, per_place)]

    low = npu_bridge.jit(step, mesh={"x": 2, "y": 2}, in_shardings=(spec,) * 6, allow_host_sync=exact).lower(
        *arguments(0)
    )
    assert [c["kind"] for c in low.collectives()] == ["ragged_all_to_all"]
    flats = [arguments(call) for call in range(CALLS)]
    for results in pool.calls(low, flats):
        for flat, (got,) in zip(flats, results):
            assert np.array_equal(got, _exchanged(*flat))


def test_gradients_of_an_exchange_of_runs_go_back(pool):
    def body(x, weight, *runs):
        def loss(x):
            got = lax.ragged_all_to_all(x, jnp.zeros((RECEIVE, 3)), *runs, axis_name=("x", "y"))
            return jnp.sum(got * weight[0])

        return jax.grad(loss)(x[0])[None]

    def local(x, weight, *runs):
        return body(x, weight, *(r[0] for r in runs))

    spec = P(("x", "y"))

    def step(*args):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False)(*args)

    flats = []
    for call in range(CALLS):
        rng = np.random.RandomState(call)
        x, weight = (rng.normal(size=(PLACES, n, 3)).astype(np.float32) for n in (SEND, RECEIVE))
        flats.append([x, weight, *_runs(call)])
    low = npu_bridge.jit(step, mesh={"x": 2, "y": 2}, in_shardings=(spec,) * 6).lower(*flats[0])
    for results in pool.calls(low, flats):
        for (x, weight, begins, sizes, targets, _), (got,) in zip(flats, results):
            want = np.zeros_like(x)
            for source in range(PLACES):
                for to in range(PLACES):
                    b, s, t = begins[source, to], sizes[source, to], targets[source, to]
                    want[source, b : b + s] += weight[to, t : t + s]
            assert np.array_equal(got, want)
