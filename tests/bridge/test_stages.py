"""Pipelines in one program: each stage runs its own branch alone, and branches that would hang are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.errors import UnsupportedError
from tests.bridge.harness import CALLS, assert_close, fresh_arguments

STAGES, MICRO, ROWS, WIDTH = 4, 6, 4, 8
UP = [(s, (s + 1) % STAGES) for s in range(STAGES)]
DOWN = [(b, a) for a, b in UP]
R = np.random.RandomState(0)
W = (R.normal(size=(STAGES, WIDTH, WIDTH)) / 3).astype(np.float32)
X = R.normal(size=(MICRO, ROWS, WIDTH)).astype(np.float32)


def orders() -> tuple[np.ndarray, np.ndarray, int]:
    """1F1B as tables: the micro-batch that each stage runs forward and backward in each tick, -1 for none.

    Forward of (stage s, micro-batch m) in tick m + s, backward in tick m + 2 (STAGES - 1) - s + 1.
    """
    ticks = MICRO + 2 * STAGES - 1
    forward, backward = (np.full((ticks, STAGES), -1, np.int32) for _ in range(2))
    for s in range(STAGES):
        for m in range(MICRO):
            forward[m + s, s], backward[m + 2 * STAGES - 1 - s, s] = m, m
    return forward, backward, ticks


def block(w, x):
    return jnp.tanh(x @ w)


def executor(w, x):
    """Loss sum(last ** 2) / 2 and the gradient of each stage's matrix: forward, backward, then one permute each way."""
    forward, backward, ticks = orders()
    stage = lax.axis_index("stage")
    w = w[0]

    def tick(carry, t):
        up, down, inputs, grad, loss = carry
        m, b = jnp.asarray(forward)[t, stage], jnp.asarray(backward)[t, stage]

        def run(up, inputs):
            given = lax.cond(stage == 0, lambda: x[m], lambda: up)
            return block(w, given), inputs.at[m].set(given)

        up, inputs = lax.cond(m >= 0, run, lambda up, inputs: (up, inputs), up, inputs)

        def back(down, grad, loss):
            y, pull = jax.vjp(block, w, inputs[b])
            g, more = lax.cond(stage == STAGES - 1, lambda: (y, (y**2).sum() / 2), lambda: (down, jnp.zeros(())))
            dw, dx = pull(g)
            return dx, grad + dw, loss + more

        down, grad, loss = lax.cond(b >= 0, back, lambda *c: c, down, grad, loss)
        return (lax.ppermute(up, "stage", UP), lax.ppermute(down, "stage", DOWN), inputs, grad, loss), None

    empty = jnp.zeros((ROWS, WIDTH))
    carry = empty, empty, jnp.zeros((MICRO, ROWS, WIDTH)), jnp.zeros_like(w), jnp.zeros(())
    *_, grad, loss = lax.scan(tick, carry, np.arange(ticks, dtype=np.int32))[0]
    return lax.psum(loss, "stage"), grad[None]


def sharded(fn, in_specs=(P("stage"), P()), out_specs=(P(), P("stage")), mesh=None):
    mesh = mesh or {"stage": STAGES}

    def step(*a):
        return jax.shard_map(
            fn, mesh=jax.sharding.get_abstract_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
        )(*a)

    return npu_bridge.jit(step, mesh=mesh, in_shardings=in_specs, out_shardings=out_specs)


def whole(w, x):
    def loss(w):
        y = x
        for s in range(STAGES):
            y = block(w[s], y)
        return (y**2).sum() / 2

    return jax.value_and_grad(loss)(w)


def test_a_1f1b_executor_on_four_processes_gives_the_loss_and_gradients_of_the_whole_model(pool):
    low = sharded(executor).lower(W, X)
    calls = [fresh_arguments((W, X), n) for n in range(CALLS)]
    want = [jax.tree.leaves(jax.jit(whole)(*a)) for a in calls]
    for rank, results in enumerate(pool.calls(low, calls)):
        for call, (a, b) in enumerate(zip(want, results, strict=True)):
            assert_close(a, b, 1e-5, 1e-5, f"rank {rank}, call {call}")  # float32, sums in another order
    text = low.as_text()
    assert "torch.where" not in text, "no stage computes what another one keeps"
    ticks = orders()[2]
    assert [(e["kind"], e["times"]) for e in low.collectives()] == [("permute", ticks)] * 2 + [("all_reduce", 1)]


def test_each_stage_of_the_executor_runs_its_own_branches_alone(monkeypatch):
    """Counted by torch at every place: one product a forward, one of its recomputation and two a backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from npu_bridge.runtime.mesh import Runtime
    from npu_bridge.runtime.program import LoadedProgram

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "matmul")
            return func(*args, **(kwargs or {}))

    low = sharded(executor).lower(W, X)
    source = low.source
    monkeypatch.setattr("npu_bridge.runtime.mesh.ensure_process_group", lambda *a: None)
    monkeypatch.setattr(Runtime, "_join", lambda self, axes: None)
    monkeypatch.setattr(LoadedProgram, "_agree", lambda self, name: None)
    monkeypatch.setattr(Runtime, "all_reduce", lambda self, x, *a: x)

    class There:
        def __init__(self, x):
            self.x = x

        def wait(self):
            return self.x.clone()

    monkeypatch.setattr(Runtime, "start_permute", lambda self, x, pairs: There(x))
    for place in range(STAGES):
        monkeypatch.setattr("torch.distributed.get_rank", lambda place=place: place)
        rt = Runtime(low.mesh, "cpu")
        program = LoadedProgram(source.text, source.constants, [], rt, "executor", source.host_arguments)
        for _ in range(2):
            with Count() as count:
                program([torch.from_numpy(W[place : place + 1].copy()), torch.from_numpy(X.copy())])
            assert count.seen == MICRO * (1 + 3), f"stage {place}: {count.seen} products"


# ---- branches that differ inside a group

AXES = {"stage": 2, "tensor": 2}
A = np.arange(32, dtype=np.float32).reshape(4, 8) / 8


def lowered(fn):
    return sharded(fn, (P("stage", "tensor"),), P("stage", "tensor"), AXES).lower(A)


def test_an_exchange_over_an_axis_on_which_its_branch_depends_is_refused():
    def inside(a):
        return lax.cond(lax.axis_index("tensor") == 0, lambda a: lax.psum(a, "tensor"), jnp.sin, a)

    with pytest.raises(
        UnsupportedError, match=r"all_reduce at .*test_stages.py:\d+.*place 0 \(stage 0, tensor 0\).* place 1 "
    ):
        lowered(inside)


def test_a_permute_that_one_of_its_ends_does_not_reach_is_refused():
    def inside(a):
        return lax.cond(lax.axis_index("stage") == 0, lambda a: lax.ppermute(a, "stage", [(0, 1), (1, 0)]), jnp.sin, a)

    with pytest.raises(UnsupportedError, match=r"permute at .* which ends without it"):
        lowered(inside)


def test_branches_that_meet_in_another_order_are_refused():
    """Each waits for the other: tensor 0 sums over stages first, tensor 1 over tensors first."""

    def inside(a):
        def one(a):
            return lax.psum(lax.psum(a, "stage"), "tensor")

        def other(a):
            return lax.psum(lax.psum(a, "tensor"), "stage")

        return lax.cond(lax.axis_index("tensor") == 0, one, other, a)

    with pytest.raises(UnsupportedError, match="which waits in all_reduce at"):
        lowered(inside)


def test_rounds_of_a_loop_that_differ_between_places_are_followed():
    """Every other round is left out, by all of a group or by one of it."""

    def rounds(differs):
        def inside(a):
            def body(i, a):
                skip = (i + (lax.axis_index("tensor") if differs else lax.axis_index("stage"))) % 2 == 0
                return lax.cond(skip, lambda a: a, lambda a: lax.psum(a, "tensor") / 2, a)

            return lax.fori_loop(0, 4, body, a)

        return inside

    assert "if " in lowered(rounds(False)).as_text()
    # As many exchanges each, but the sums would mix rounds.
    with pytest.raises(UnsupportedError, match="which waits in all_reduce at .* in round 0"):
        lowered(rounds(True))
