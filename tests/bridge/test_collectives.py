"""Collectives of shard_map, changed layouts, sub-axes and permuted meshes on four gloo processes, against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge import ops
from tests.bridge.harness import CALLS, assert_close, fresh_arguments

SIZES = {"x": 2, "y": 2}
MESH = AbstractMesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
A = np.arange(64, dtype=np.float32).reshape(8, 8) ** 0.5


def _map(fn, in_specs, out_specs, **options):
    """shard_map over whatever mesh the program is traced under."""
    return lambda a: jax.shard_map(
        fn, mesh=jax.sharding.get_abstract_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False, **options
    )(a)


XY = P("x", "y")
COLLECTIVES = {
    "psum and axis_index": (
        _map(lambda t: lax.psum(t * (1 + lax.axis_index("x")), "x"), XY, P(None, "y")),
        XY,
        P(None, "y"),
    ),
    "psum over both axes": (_map(lambda t: lax.psum(t.sum(), ("x", "y"))[None], XY, P()), XY, P()),
    "pmax, pmin": (_map(lambda t: lax.pmax(t, "x") - lax.pmin(t, ("y", "x")), XY, XY), XY, XY),
    "pmean": (_map(lambda t: lax.pmean(t, "y"), XY, P("x", None)), XY, P("x")),
    "all_gather": (
        _map(lambda t: lax.all_gather(t, "y", axis=1, tiled=True) @ jnp.ones((8, 8)), XY, P("x", None)),
        XY,
        P("x"),
    ),
    "all_gather over both axes": (
        _map(lambda t: lax.all_gather(t, ("y", "x"), axis=0, tiled=True), P(("y", "x")), P(None)),
        P(("y", "x")),
        P(),
    ),
    "all_gather new dimension": (_map(lambda t: lax.all_gather(t, "x").sum(0), XY, P(None, "y")), XY, P(None, "y")),
    "psum_scatter": (
        _map(lambda t: lax.psum_scatter(t, "x", scatter_dimension=0, tiled=True), P(None, "y"), P("x", "y")),
        P(None, "y"),
        XY,
    ),
    "all_to_all": (
        _map(lambda t: lax.all_to_all(t, "x", 1, 0, tiled=True), P("x"), P(None, "x")),
        P("x"),
        P(None, "x"),
    ),
    "ppermute": (_map(lambda t: lax.ppermute(t, "x", [(0, 1), (1, 0)]), XY, XY), XY, XY),
    "ppermute that leaves one out": (_map(lambda t: lax.ppermute(t, "y", [(0, 1)]), XY, XY), XY, XY),
    "ring in a scan": (
        _map(
            lambda t: lax.scan(
                lambda c, _: ((lax.ppermute(c[0], "x", [(0, 1), (1, 0)]), c[1] + c[0]), None),
                (t, t * 0),
                None,
                length=2,
            )[0][1],
            XY,
            XY,
        ),
        XY,
        XY,
    ),
    "some axes manual": (
        _map(lambda t: lax.all_gather(t, "x", axis=0, tiled=True) * 2, P("x"), P(None), axis_names={"x"}),
        XY,
        P(None, "y"),
    ),
    "layout changes": (lambda a: a * 2, XY, P("y", "x")),
    "split moves to another dimension": (lambda a: a + 1, P("x"), P(None, "x")),
    "both axes on one dimension, other order": (lambda a: a + 1, P(("x", "y")), P(("y", "x"))),
    "sub-axes": (lambda a: a.reshape(2, 4, 8).sum(0), P(("x", "y")), P("x")),
    "sum scattered over two dimensions": (lambda a: a.reshape(8, 2, 4).sum(0), P(("x", "y")), XY),
    "sum over a split dimension": (lambda a: (a.sum(0), a.max(1), (a > 3).any(0), a.prod(1) > 0), XY, P()),
    "transpose": (lambda a: a.T @ a, XY, XY),
    "replicated arithmetic": (lambda a: jnp.linspace(0, 1, 8) + a, P(), XY),
    "gradient through collectives": (
        jax.grad(
            lambda a: jnp.sum(
                _map(lambda t: jnp.sin(lax.psum(t, "x")) * lax.all_gather(t, "x").sum(0), XY, P(None, "y"))(a) ** 2
            )
        ),
        XY,
        XY,
    ),
}


@functools.cache
def lower_collective(name, overlap=True):
    fn, spec, out = COLLECTIVES[name]
    return npu_bridge.jit(fn, mesh=SIZES, in_shardings=(spec,), out_shardings=out, overlap=overlap).lower(A)


WAITED_FOR = [("all_to_all", False), ("ppermute", False)]  # exchanges that run beside the computation otherwise


def _xla(name, arguments):
    """XLA's results on four devices, for each argument."""
    fn, spec, out = COLLECTIVES[name]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        run = jax.jit(fn, out_shardings=NamedSharding(mesh, out))
        return [jax.tree.map(np.asarray, run(jax.device_put(a, NamedSharding(mesh, spec)))) for a in arguments]


@pytest.mark.parametrize(("name", "overlap"), [*((name, True) for name in COLLECTIVES), *WAITED_FOR])
def test_collective_equals_xla_on_four_processes(name, overlap, pool):
    arguments = [fresh_arguments(A, call) for call in range(CALLS)]
    want = _xla(name, arguments)
    for rank, calls in enumerate(pool.calls(lower_collective(name, overlap), [[a] for a in arguments])):
        for call, got in enumerate(calls):
            assert_close(want[call], got, 1e-5, 1e-5, f"{name}, rank {rank}, call {call}")


def test_a_permuted_mesh_places_shards_by_its_own_order(pool):
    """Devices 3, 1, 2, 0: rank 3 sits at place 0 and holds the first shard."""
    devices = np.array(jax.devices()[:4])[[3, 1, 2, 0]].reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("x", "y"))

    def fn(a):
        return (a @ a.T, a.sum(0))

    low = npu_bridge.jit(fn, mesh=mesh, in_shardings=(P("x", "y"),), out_shardings=(P("y", "x"), P("y"))).lower(A)
    assert low.mesh.devices == (3, 1, 2, 0)
    for got in pool.run(low, [A]):
        assert_close((A @ A.T, A.sum(0)), got, 1e-5, 1e-4, "permuted mesh")


def test_sub_axes_name_a_part_of_an_axis(pool):
    """An axis of four split by a reshape into two dimensions of two: Shardy names its halves."""

    def fn(a):
        return jnp.cos(a.reshape(2, 4, 8)).sum((0, 2))

    low = npu_bridge.jit(fn, mesh={"x": 4}, in_shardings=(P("x"),), out_shardings=P()).lower(A)
    for got in pool.run(low, [A]):
        assert_close(np.cos(A.reshape(2, 4, 8)).sum((0, 2)), got, 1e-5, 1e-5, "sub-axes")


def test_reports_count_bytes_that_leave_a_device():
    low = npu_bridge.jit(lambda a: a @ a.T, mesh=SIZES, in_shardings=(P("x", "y"),), out_shardings=P("x")).lower(A)
    for c in low.collectives():
        whole = int(np.prod(c["shape"])) * 4
        n = c["devices"]
        expected = {
            "all_gather": whole * (n - 1) // n,
            "all_reduce": 2 * whole * (n - 1) // n,
            "reduce_scatter": whole * (n - 1) // n,
            "all_to_all": whole * (n - 1) // n,
            "permute": whole,
        }[c["kind"]]
        assert c["bytes"] == expected, c


def test_sums_of_16_bit_floats_travel_in_float32_when_asked():
    def fn(a):
        return a.astype(jnp.bfloat16).sum(0)

    kinds = {}
    for wide in (False, True):
        low = npu_bridge.jit(fn, mesh=SIZES, in_shardings=(P("x"),), out_shardings=P(), reduce_in_float32=wide).lower(A)
        kinds[wide] = {c["dtype"] for c in low.collectives() if c["kind"] == "all_reduce"}
    assert kinds == {False: {"bf16"}, True: {"f32"}} or kinds[True] == {"f32"}, kinds


def test_an_operator_in_a_shard_map_that_checks_it_varies_over_the_axes_of_its_operands(pool):
    """A result that passed for replicated would be handed on unsummed.

    A replicated scale is made varying, so that its gradient is summed.
    """
    scale = np.linspace(0.5, 1.5, 8).astype(np.float32)

    def norm(a, g):
        return ops.rms_norm(a, g, eps=1e-6)

    def inside(a, g):
        y = norm(a, lax.pcast(g, "x", to="varying"))
        return lax.psum((y**2).sum(), "x")

    def sharded(a, g):
        return jax.shard_map(
            inside, mesh=jax.sharding.get_abstract_mesh(), in_specs=(P("x"), P()), out_specs=P(), check_vma=True
        )(a, g)

    def step(f):
        return jax.value_and_grad(f, argnums=(0, 1))

    want = jax.jit(step(lambda a, g: (norm(a, g) ** 2).sum()))(A, scale)
    low = npu_bridge.jit(
        step(sharded), mesh={"x": 4}, in_shardings=(P("x"), P()), out_shardings=(P(), (P("x"), P()))
    ).lower(A, scale)
    for got in pool.run(low, [A, scale]):
        assert_close(want, got, 1e-5, 1e-5, "norm in a shard_map")  # float32, sums of 64 terms
