"""Every operation the bridge writes: value and gradient, on one device and on a 2 x 2 mesh, against XLA."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.runtime.api import Compiled
from tests.bridge.cases import CASES
from tests.bridge.harness import CALLS, assert_close, fresh_arguments, lower_sharded, value_and_gradient


@functools.cache
def _calls(name):
    """Arguments and XLA's results of several calls of one program."""
    case = CASES[name]
    run = jax.jit(value_and_gradient(case.fn, case.grad, case.args))
    arguments = [fresh_arguments(case.args, call) for call in range(CALLS)]
    return arguments, [jax.tree.map(np.asarray, run(*a)) for a in arguments]


@functools.cache
def lowered(name, mesh):
    """The case as a written program; the registry's gate looks at the same ones."""
    case = CASES[name]
    fn = value_and_gradient(case.fn, case.grad, case.args)
    if mesh:
        return lower_sharded(fn, case.args, allow_host_sync=case.host_sync)
    return npu_bridge.jit(fn, allow_host_sync=case.host_sync).lower(*case.args)


@pytest.mark.parametrize("name", CASES)
def test_operation_equals_xla_on_one_device(name):
    case, low = CASES[name], lowered(name, False)
    program = Compiled(low, "cpu")
    for call, (arguments, want) in enumerate(zip(*_calls(name))):
        got = jax.tree.unflatten(low.traced.out_tree, program(jax.tree.leaves(arguments)))
        assert_close(want, jax.tree.map(np.asarray, got), case.rtol, case.atol, f"{name}, call {call}")


@pytest.mark.parametrize("name", CASES)
def test_operation_equals_xla_on_a_mesh(name, pool):
    case, (arguments, want) = CASES[name], _calls(name)
    for rank, calls in enumerate(pool.calls(lowered(name, True), [jax.tree.leaves(a) for a in arguments])):
        for call, got in enumerate(calls):
            assert_close(want[call], got, case.rtol, case.atol, f"{name}, rank {rank}, call {call}")


def test_every_fused_operator_equals_xla_on_a_mesh(pool):
    """The step that uses all of them, run by four processes: values, gradients and moments of every parameter."""
    from tests.ops import test_through_the_bridge as every

    arguments = every.make_arguments()
    low = npu_bridge.jit(every.step, mesh={"fsdp": 2, "tensor": 2}, in_shardings=(*[every.SPECS] * 3, P("fsdp"))).lower(
        *arguments
    )
    want = jax.tree.leaves(jax.jit(every.step)(*arguments))
    for rank, found in enumerate(pool.run(low, jax.tree.leaves(arguments))):
        for n, (a, b) in enumerate(zip(want, found, strict=True)):
            a, b = np.asarray(a), np.asarray(b)
            difference = np.abs(a - b).max() / np.abs(a).max()
            # Some fifty operators, each summing float32 in another order on the two sides, and over shards.
            assert difference < 5e-5, f"rank {rank}, result {n}: largest relative difference {difference:.2e}"
