"""Operations along a dimension that is split over devices: values as on one device, on four processes and two meshes.

XLA's own four-device program is no witness: its cumprod and cummax along a sharded dimension differ from one device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import npu_bridge
from tests.bridge.harness import CALLS, assert_close, fresh_arguments

MESHES = {"2 x 2": ({"a": 2, "b": 2}, P("a", "b")), "4": ({"a": 4}, P("a"))}
X = np.random.RandomState(0).randn(8, 8).astype(np.float32)
KEY = np.array([3, 7], np.uint32)


def _constrained(x, *axes):
    """A constraint where there is a mesh; one device needs none."""
    return x if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(x, P(*axes))


def _convolve(x):
    image = x.reshape(1, 1, 8, 8)
    return lax.conv_general_dilated(image, image[:, :, :3, :3], (1, 2), "SAME")


def _uneven(x):
    """Constraints that do not divide, before and behind operations that need neighbours."""
    y = _constrained(jnp.sin(x)[:6], "a")
    z = _constrained(x[:7, 1:], None, "a")
    return jnp.cumsum(y * 2, 0), z @ y.sum(1)[:, None].repeat(7, 1).T[:, :5], _constrained(y[:5], "a").sum(0)


PROGRAMS = {
    "cumulative": lambda x: (
        jnp.cumsum(x, 0),
        jnp.cumprod(x, 0),
        lax.cummax(x, 0),
        lax.cummin(x, 0, reverse=True),
        lax.cumlogsumexp(x, 0),
    ),
    "associative scan": lambda x: lax.associative_scan(lambda a, b: a * 0.5 + b, x, axis=0),
    "sort": lambda x: (jnp.sort(x, 0), jnp.argsort(x, 0), lax.sort((jnp.round(x), x), dimension=0, num_keys=2)),
    "top-k": lambda x: (lax.top_k(x, 3), lax.top_k(x.T, 2), lax.approx_max_k(x, 2, reduction_dimension=0)),
    "argmax, extremes": lambda x: (jnp.argmax(x, 0), jnp.argmin(x), x.max(0), x.prod(0), jnp.ptp(x)),
    "median, quantile, unique": lambda x: (jnp.median(x, 0), jnp.quantile(x, 0.3), jnp.unique(jnp.round(x), size=12)),
    "search": lambda x: (
        jnp.searchsorted(jnp.sort(x[:, 0]), x[:, 1]),
        jnp.digitize(x, jnp.sort(x[0])),
        jnp.histogram(x, 5)[0],
    ),
    "concatenate, stack": lambda x: (jnp.concatenate([x, x * 2, x[:3]], 0), jnp.stack([x, x.T]), jnp.tile(x, (2, 1))),
    "pad": lambda x: (
        jnp.pad(x, ((1, 3), (0, 2))),
        lax.pad(x, 0.0, ((-1, 1, 0), (1, 0, 1))),
        jnp.pad(x, 2, mode="reflect"),
    ),
    "slices, reversal, roll": lambda x: (x[1:-1, ::2], x[::-1], jnp.roll(x, 3, 0), jnp.diff(x, axis=0)),
    "dynamic slices": lambda x: (
        lax.dynamic_slice(x, (jnp.int32(jnp.abs(x[0, 0]) * 3), 1), (3, 4)),
        lax.dynamic_update_slice(x, x[:2, :2], (jnp.int32(5), 3)),
    ),
    "updates": lambda x: (
        x.at[3].set(1.0),
        x.at[1:5, 2].add(x[0, :4]),
        x.at[jnp.array([0, 7, 7])].max(2.0),
        x.at[:, 3].multiply(2),
    ),
    "lookups": lambda x: (
        x[jnp.array([7, 0, 3])],
        jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
        x[jnp.arange(8), jnp.arange(8)[::-1]],
    ),
    "segments": lambda x: (jax.ops.segment_sum(x, jnp.arange(8) % 3, 3), jax.ops.segment_max(x, jnp.arange(8) // 3, 3)),
    "scatters of sharded updates": lambda x: (
        [
            op(jnp.ones((3, 8)).at[jnp.arange(8) // 3])
            for op in (
                lambda r: r.add(x),
                lambda r: r.multiply(x),
                lambda r: r.max(x),
                lambda r: r.min(x),
                lambda r: r.subtract(x),
                lambda r: r.apply(jnp.sin),
            )
        ]
        + [
            x.at[jnp.array([3, 1, 1, 0, 7, 6, 9, 2])].set(x),
            jnp.zeros(3, bool).at[jnp.arange(8) // 3].max(x[:, 0] > 1),
            x.at[jnp.arange(8) % 5].add(x),
        ]
    ),
    "windows": lambda x: (
        lax.reduce_window(x, -jnp.inf, lax.max, (3, 2), (2, 2), "SAME"),
        lax.reduce_window(x, 0.0, lax.add, (2, 3), (1, 1), "VALID"),
    ),
    "convolution": lambda x: (
        _convolve(x),
        jnp.convolve(x[:, 0], x[0, :3]),
        jax.grad(lambda y: (_convolve(y) ** 2).sum())(x),
    ),
    "random": lambda x, key: (
        jax.random.normal(key, x.shape) + x,
        jax.random.permutation(key, x),
        jax.random.categorical(key, x),
    ),
    "linear algebra": lambda x: (
        jnp.linalg.cholesky(x @ x.T + 9 * jnp.eye(8)),
        jnp.linalg.solve(x + 9 * jnp.eye(8), x),
        jnp.trace(x),
        jnp.tril(x, 1),
    ),
    "fft": lambda x: (jnp.abs(jnp.fft.fft(x, axis=0)), jnp.fft.irfft2(jnp.fft.rfft2(x))),
    "reshape, transpose": lambda x: (x.reshape(4, 16), x.reshape(2, 2, 2, 8).transpose(3, 1, 0, 2), x.ravel()[1:60:3]),
    "scan over a sharded dimension": lambda x: lax.scan(lambda c, v: (c * 0.5 + v, c.sum()), x[0], x),
    "uneven constraints": _uneven,
    "gradients": lambda x: jax.grad(
        lambda y: (jnp.cumsum(y, 0) * jnp.sort(y, 0)).sum() + jnp.concatenate([y, y[:3]], 0).prod()
    )(x * 0.1 + 1),
}


# Exchanges of each program on the mesh of four, by kind: gathers, all-to-alls, reductions. Where rows change places
# with columns (sorts, cumulative sums) that is the least; windows, padding, slices, scans and FFT gather their operand
# whole, where neighbours' rows would do.
EXCHANGES = {
    "cumulative": (0, 6, 0),
    "associative scan": (1, 0, 0),
    "sort": (0, 7, 0),
    "top-k": (2, 0, 0),
    "argmax, extremes": (2, 0, 4),
    "median, quantile, unique": (5, 2, 6),
    "search": (3, 0, 3),
    "concatenate, stack": (3, 1, 0),
    "pad": (1, 0, 0),
    "slices, reversal, roll": (1, 2, 0),
    "dynamic slices": (1, 0, 0),
    "updates": (1, 0, 0),
    "lookups": (1, 3, 2),
    "segments": (0, 0, 2),
    "scatters of sharded updates": (4, 0, 5),
    "windows": (1, 0, 0),
    "convolution": (3, 0, 0),
    "random": (0, 0, 1),
    "linear algebra": (3, 1, 2),
    "fft": (2, 0, 0),
    "reshape, transpose": (2, 0, 0),
    "scan over a sharded dimension": (2, 0, 0),
    "uneven constraints": (2, 0, 0),
    "gradients": (3, 7, 0),
}
ACROSS = [("all_to_all", (2, 8)), ("all_to_all", (8, 2))]  # rows for columns and back
BY_HAND = {
    "cumsum across": (lambda x: jnp.cumsum(x, 0), ACROSS),
    "cumsum along": (lambda x: jnp.cumsum(x, 1), []),
    "sort across": (lambda x: jnp.sort(x, 0), ACROSS),
    "sort along": (lambda x: jnp.sort(x, 1), []),
    "top-k along": (lambda x: lax.top_k(x, 3)[0], []),
    "max across": (lambda x: x.max(0), [("all_reduce", (8,))]),
    "segment sum": (lambda x: jax.ops.segment_sum(x, jnp.arange(8) % 3, 3), [("all_reduce", (3, 8))]),
    "product with its transpose": (lambda x: x.T @ x, [("all_reduce", (8, 8))]),
    "normal numbers": (lambda x: jax.random.normal(jax.random.key(0), x.shape) + x, []),
    "row-wise update": (lambda x: x.at[:, 3].set(0.0), []),
}


def _exchanged(fn, *args):
    options = dict(mesh={"a": 4}, in_shardings=(P("a"), P())[: len(args)])
    return npu_bridge.jit(fn, **options).lower(*args).collectives()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_sharded_program_exchanges_no_more_than_written_down(name):
    found = [e["kind"] for e in _exchanged(PROGRAMS[name], X, *((KEY,) if name == "random" else ()))]
    assert set(found) <= {"all_gather", "all_to_all", "all_reduce"}
    assert tuple(found.count(kind) for kind in ("all_gather", "all_to_all", "all_reduce")) == EXCHANGES[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_one_operation_exchanges_what_is_counted_by_hand(name):
    fn, wanted = BY_HAND[name]
    assert [(e["kind"], e["shape"]) for e in _exchanged(fn, X)] == wanted


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_program_gives_what_one_device_gives(pool, name, mesh):
    (axes, spec), fn = MESHES[mesh], PROGRAMS[name]
    args = (X, KEY) if name == "random" else (X,)
    low = npu_bridge.jit(fn, mesh=axes, in_shardings=(spec, P())[: len(args)]).lower(*args)
    calls = [fresh_arguments(args, call) for call in range(CALLS)]
    flats = [[jax.tree.leaves(call)[i] for i in low.traced.kept] for call in calls]
    wants = [[np.asarray(x) for x in jax.tree.leaves(jax.jit(fn)(*call))] for call in calls]
    for rank, answers in enumerate(pool.calls(low, flats)):
        for call, (want, got) in enumerate(zip(wants, answers, strict=True)):
            assert_close(want, got, 1e-4, 1e-4, f"rank {rank}, call {call}")
