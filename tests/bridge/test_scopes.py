"""Time by named_scope: where marks stand in a written program, what they leave of its results, what torch's profiler
shows of them.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import npu_bridge
import npu_bridge.ops
from npu_bridge.runtime import scopes

TEXT = '''"""One step of `f`."""
import torch


def main(rt, K, args):
    [a0] = args
    # lower.py:135
    v0 = K[0]  # f32[2]
    # jvp(mlp)/up  model.py:3
    v1 = torch.mm(a0, v0)  # f32[2]
    del a0
    v2 = rt.start_all_gather(v1, [('fsdp',)])  # f32[4]
    v3 = v1.mul_(2.0)  # f32[2]
    c0 = v3
    for i0 in range(3):
        v4 = c0.add_(v0)  # f32[2]
        # loop/inner  model.py:9
        v5 = v4.neg_()  # f32[2]
        c0 = v5
    v6 = c0.sum()  # f32[]
    v7 = v2.wait()  # f32[4]
    return [v6, v7]
'''


def test_marks_stand_where_the_scope_or_the_depth_changes_and_exchanges_have_their_own():
    text, names = scopes.with_marks(TEXT)
    assert names == ["", "jvp(mlp)/up", "collectives", "loop/inner"]
    marked = [line.strip() for line in text.splitlines() if "mark(" in line or (" = " in line and "  # " in line)]
    assert [line.split(" =")[0] for line in marked] == [
        "mark(0)",
        "v0",
        "mark(1)",
        "v1",
        "mark(2)",
        "v2",
        "mark(1)",
        "v3",
        "mark(1)",
        "v4",
        "mark(3)",
        "v5",
        "mark(3)",
        "v6",
        "mark(2)",
        "v7",
    ]
    # Nothing else has changed, and a round of the loop begins with a mark of its own.
    assert "\n".join(line for line in text.splitlines() if "mark(" not in line) + "\n" == TEXT
    assert "    for i0 in range(3):\n        mark(1)\n" in text


def model(x, w):
    with jax.named_scope("first"):
        x = jnp.tanh(x @ w)
    with jax.named_scope("second"):
        for _ in range(4):
            x = x @ w
    return x


@pytest.fixture(scope="module")
def program():
    values = np.random.default_rng(0)
    x, w = (values.standard_normal((768, 768)).astype(np.float32) / 30 for _ in range(2))
    step = npu_bridge.jit(model)
    return step, x, w, np.asarray(step(x, w))


def test_recording_changes_no_result_and_each_scope_gets_the_time_between_its_marks(program, monkeypatch):
    step, x, w, before = program
    ticks = iter(range(1000))  # a clock that moves on by a second each time it is read: no test hangs on the machine
    monkeypatch.setattr(scopes, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    with npu_bridge.record_scopes("cpu") as times:
        got = np.asarray(step(x, w))
    assert np.array_equal(got, before), f"largest difference {np.abs(got - before).max()}"
    # Two readings around the preparation, then one at each mark: the start of both scopes and the end of the program.
    assert times.calls == {"model": 1} and times.preparing == 1 and next(ticks) == 5
    assert times.seconds == {("model", "first"): 1, ("model", "second"): 1}
    assert np.array_equal(np.asarray(step(x, w)), before) and times.calls == {"model": 1}, "recorded after its end"


def test_torchs_profiler_shows_the_scopes_around_their_operators(program):
    step, x, w, _ = program
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        npu_bridge.record_scopes("cpu"),
    ):
        step(x, w)
    events = [(event.name, event.time_range.start, event.time_range.end) for event in profiler.events()]
    products = [(start, end) for name, start, end in events if name == "aten::mm"]
    assert len(products) == 5
    for scope, expected in ("first", 1), ("second", 4):
        [(begin, finish)] = [(start, end) for name, start, end in events if name == scope]
        assert sum(begin <= start and end <= finish for start, end in products) == expected, (scope, events)


def test_a_second_recording_at_the_same_time_is_refused(program):
    with (
        npu_bridge.record_scopes("cpu"),
        pytest.raises(RuntimeError, match="recorded already"),
        npu_bridge.record_scopes("cpu"),
    ):
        pass
    with npu_bridge.record_scopes("cpu"):
        pass


def test_a_step_that_fails_leaves_no_range_open(program):
    step, x, w, _ = program
    with npu_bridge.record_scopes("cpu") as times:
        step(x, w)
        compiled = next(iter(step._compiled.values()))[0]
        with pytest.raises(TypeError):
            times.program(compiled)([None, None], {})
        assert times._open is None


def test_scopes_inside_of_a_scan_carry_the_path_of_what_calls_it():
    def block(x, w):
        with jax.named_scope("mlp"):
            return jnp.tanh(x @ w), None

    def loss(w, x):
        with jax.named_scope("layers"):
            return jnp.sum(jax.lax.scan(jax.checkpoint(block), x, w)[0])

    text = npu_bridge.jit(jax.grad(loss)).lower(np.ones((3, 8, 8), np.float32), np.ones((4, 8), np.float32)).as_text()
    names = scopes.with_marks(text)[1]
    assert "jvp(layers)/while/body/mlp" in names and "transpose(jvp(layers))/while/body/checkpoint/mlp" in names, names
    assert not [name for name in names if name and "layers" not in name], names


def test_operators_forward_and_backward_stand_at_the_line_that_calls_them():
    def loss(x, scale):
        return jnp.sum(npu_bridge.ops.linear(npu_bridge.ops.rms_norm(x, scale, eps=1e-6), jnp.ones((8, 4))))

    low = npu_bridge.jit(jax.value_and_grad(loss)).lower(np.ones((4, 8), np.float32), np.ones(8, np.float32))
    here = f"test_scopes.py:{loss.__code__.co_firstlineno + 1} "
    assert len(low.kernels()) == 2 and all(here in kernel["location"] for kernel in low.kernels()), low.kernels()
    assert "norms.py" not in low.as_text() and "linear.py" not in low.as_text() and "jaxcompat.py" not in low.as_text()
