"""Callbacks to Python: values as XLA's, once at each place the program says, in the chosen branch alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.errors import UnsupportedError
from tests.bridge.harness import call_three_times


def _x(call: int = 0) -> np.ndarray:
    return np.random.RandomState(call).randn(3, 4).astype(np.float32)


def _like(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _three(program) -> None:
    """Three calls with fresh arguments."""
    jitted = npu_bridge.jit(program)
    for call in range(3):
        np.asarray(jax.tree.leaves(jitted(_x(call)))[0])


def test_pure_callbacks_return_what_xla_gets():
    def program(x):
        inside = lax.scan(lambda c, v: (c + jax.pure_callback(np.sin, _like(v), v), v), x[0], x)
        rows = jax.vmap(lambda v: jax.pure_callback(np.cos, _like(v), v, vmap_method="sequential"))(x)
        bits = jax.pure_callback(lambda v: v.astype(np.int32).view(np.uint32), _like(x, jnp.uint32), x * 100)
        return inside, rows, bits

    call_three_times(program, _x())


def test_debug_prints_show_each_call(capfd):
    _three(lambda x: (jax.debug.print("first {} of {n}", x[0, 0], n=x.size), x * 2)[1])
    shown = [f"first {_x(call)[0, 0]} of 12" for call in range(3)]
    assert capfd.readouterr().out.splitlines() == shown


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_happen_even_if_their_results_are_not_read(ordered):
    calls = []

    def note(v):
        calls.append(np.array(v))
        return v

    _three(lambda x: (io_callback(note, _like(x), x, ordered=ordered), x + 1)[1])
    assert len(calls) == 3
    for call, seen in enumerate(calls):
        np.testing.assert_array_equal(seen, _x(call))


def test_what_a_callback_keeps_is_not_overwritten():
    kept = []

    def program(x):
        y = x * 2
        jax.debug.callback(kept.append, y)
        return jnp.sin(y) + 1  # may take y's memory

    _three(program)
    for call, y in enumerate(kept):
        np.testing.assert_array_equal(y, _x(call) * 2)


def test_loops_call_back_in_order_each_round():
    rounds = []

    def program(x):
        def body(c, v):
            jax.debug.callback(lambda s: rounds.append(float(s)), v[0])
            return c + v, None

        return lax.scan(body, x[0], x)[0]

    _three(program)
    assert rounds == [float(v) for call in range(3) for v in _x(call)[:, 0]]


def test_only_the_chosen_branch_calls_back():
    called = []

    def program(x):
        def yes():
            jax.debug.callback(lambda: called.append("yes"))
            return x + 1

        def no():
            jax.debug.callback(lambda v: called.append("no"), x[0, 0])
            return x - 1

        return lax.cond(x[0, 0] > 0, yes, no)

    jitted = npu_bridge.jit(program)
    for call in range(3):
        x = _x(call)
        np.testing.assert_array_equal(np.asarray(jitted(x)), x + (1 if x[0, 0] > 0 else -1))
    assert called == ["yes" if _x(call)[0, 0] > 0 else "no" for call in range(3)]


def test_an_error_raised_in_a_branch_is_raised_only_where_the_branch_is_chosen():
    def fail(v):
        raise ValueError("negative")

    def program(x):
        return lax.cond(x[0] < 0, lambda: jax.pure_callback(fail, _like(x), x), lambda: x) * 2

    jitted = npu_bridge.jit(program)
    for call in range(3):
        x = np.abs(_x(call)[0])
        np.testing.assert_array_equal(np.asarray(jitted(x)), x * 2)
    with pytest.raises(ValueError, match="negative"):
        jitted(-x)


def test_a_wrong_result_names_the_program_line():
    def program(x):
        return jax.pure_callback(lambda v: v[0], _like(x), x)

    with pytest.raises(TypeError, match=r"pure_callback returned \['float32\[4\]'\].*float32\[3, 4\]") as error:
        npu_bridge.jit(program)(_x())
    assert "test_callbacks.py" in error.value.__notes__[0]


def test_captured_steps_refuse_callbacks_unless_the_host_may_wait():
    def program(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(UnsupportedError, match="debug_print.*allow_host_sync=True"):
        npu_bridge.jit(program, device="npu").lower(_x())
    assert "rt.callback(0, [a0])" in npu_bridge.jit(program, device="npu", allow_host_sync=True).lower(_x()).as_text()


def test_callbacks_get_whole_operands_of_sharded_programs():
    def program(x):
        jax.debug.print("{}", x)
        return jax.pure_callback(np.sin, _like(x), x) * 2

    low = npu_bridge.jit(program, mesh={"a": 2, "b": 2}, in_shardings=(P("a", "b"),)).lower(_x().repeat(2, 0))
    assert [c["kind"] for c in low.collectives()] == ["all_gather"]

    def effect(x):
        return io_callback(np.sin, _like(x), x)

    with pytest.raises(UnsupportedError, match="every process would call it"):
        npu_bridge.jit(effect, mesh={"a": 2}, in_shardings=(P("a"),)).lower(_x().repeat(2, 0))
