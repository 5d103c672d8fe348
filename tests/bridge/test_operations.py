"""Every operation the bridge writes: value and gradient, on one device and on a 2 x 2 mesh, against XLA."""

import functools

import jax
import numpy as np
import pytest

import npu_bridge
from tests.bridge.cases import CASES
from tests.bridge.harness import assert_close, lower_sharded, value_and_gradient


@functools.cache
def _expected(name):
    case = CASES[name]
    return jax.jit(value_and_gradient(case.fn, case.grad, case.args))(*case.args)


@pytest.mark.parametrize("name", CASES)
def test_operation_equals_xla_on_one_device(name):
    case = CASES[name]
    fn = npu_bridge.jit(value_and_gradient(case.fn, case.grad, case.args), allow_host_sync=case.host_sync)
    got = jax.tree.map(np.asarray, fn(*case.args))
    assert_close(_expected(name), got, case.rtol, case.atol, name)


@pytest.mark.parametrize("name", CASES)
def test_operation_equals_xla_on_a_mesh(name, pool):
    case = CASES[name]
    low = lower_sharded(value_and_gradient(case.fn, case.grad, case.args), case.args, allow_host_sync=case.host_sync)
    results = pool.run(low, case.args)
    for rank, got in enumerate(results):
        assert_close(_expected(name), got, case.rtol, case.atol, f"{name}, rank {rank}")
