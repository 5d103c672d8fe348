"""Ten training steps of five programs built from public packages, sharded and not, equal to XLA."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import npu_bridge
from tests.bridge.public_programs import PROGRAMS

STEPS = 10
MESH = {"data": 2, "model": 2}
# Ten float32 steps against XLA: the bar of the project.
BAR = 1e-5


@functools.cache
def _program(name):
    step, state, make = PROGRAMS[name]()
    return step, jax.tree.map(np.asarray, state), [make(i) for i in range(STEPS)]


@functools.cache
def _expected(name):
    step, state, batches = _program(name)
    run, losses = jax.jit(step), []
    for b in batches:
        state, loss = run(state, b)
        losses.append(float(loss))
    return losses, jax.tree.map(np.asarray, state)


def _compare(name, losses, state):
    want, final = _expected(name)
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses, want))
    assert gap < BAR, f"{name}: loss differs by {gap:.2e} relative within {STEPS} steps"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(final), jax.tree.leaves(state)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-3)
        # An update of an adaptive optimizer is a ratio; where the gradient is all rounding its sign is, too.
        assert np.mean(np.abs(a - b) > 1e-3 * max(np.abs(a).max(initial=0.0), 1e-3)) < 0.01, (
            f"{name}{jax.tree_util.keystr(path)}: {worst:.2e}"
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_public_program_trains_like_xla_on_one_device(name):
    step, state, batches = _program(name)
    fn, losses = npu_bridge.jit(step, donate_argnums=0), []
    for b in batches:
        state, loss = fn(state, b)
        losses.append(float(loss))
    _compare(name, losses, jax.tree.map(np.asarray, state))


def _spec(x) -> P:
    """Matrices are split by their last dimension over `model`, everything else is replicated."""
    shape = np.shape(x)
    return P(*[None] * (len(shape) - 1), "model") if len(shape) >= 2 and shape[-1] % 2 == 0 else P()


@pytest.mark.parametrize("name", PROGRAMS)
def test_public_program_trains_like_xla_on_four_processes(name, pool):
    step, state, batches = _program(name)
    specs = jax.tree.map(_spec, state)
    data = jax.tree.map(lambda _: P("data"), batches[0])
    fn = npu_bridge.jit(step, mesh=MESH, in_shardings=(specs, data), out_shardings=(specs, P()), donate_argnums=0)
    for metrics, final in pool.steps(fn.lower(state, batches[0]), state, batches):
        _compare(name, [m[0] for m in metrics], final)
