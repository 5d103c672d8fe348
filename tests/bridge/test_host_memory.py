"""Host memory: what is offloaded gives the same bits as what stays on the device, however late its copies run.

`LateMemory` stands in for a device's side streams: a copy runs only when something waits for it, and until then its
target holds NaN. A statement that does not wait, or that overwrites what is still to be copied, changes the result.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compute_on import compute_on
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

import npu_bridge
from npu_bridge import jaxcompat
from npu_bridge.compiler.importer import Importer
from npu_bridge.compiler.passes.host_memory import place_values
from npu_bridge.errors import UnsupportedError
from npu_bridge.runtime.api import Compiled
from npu_bridge.runtime.host_memory import HostMemory
from tests.bridge.harness import call_three_times, fresh_arguments

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
LAYERS, WIDTH = 4, 8
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, WIDTH)).astype(np.float32)
W = (RNG.standard_normal((LAYERS, WIDTH, WIDTH)) / 3).astype(np.float32)


class _Stream:
    """Runs what it was given only when it is waited for."""

    def __init__(self):
        self.tasks, self.done = [], 0

    def run(self, end):
        while self.done < end:
            self.done += 1
            self.tasks[self.done - 1]()

    def record_event(self):
        return self, len(self.tasks)

    def wait_event(self, event):
        self.tasks.append(lambda: event[0].run(event[1]))

    def wait_stream(self, stream):
        pass  # the computation runs at once, so that a side stream is always behind it

    def synchronize(self):
        self.run(len(self.tasks))


class _Computation:
    def wait_event(self, event):
        event[0].run(event[1])

    def wait_stream(self, stream):
        stream.synchronize()


class _Streams:
    Stream = _Stream
    stream = staticmethod(contextlib.nullcontext)

    @staticmethod
    def current_stream():
        return _Computation()


class LateMemory(HostMemory):
    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.backend, self.copies = _Streams, 0

    def _empty(self, shape, dtype):
        return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype)

    def _copy(self, stream, target, source):
        self.copies += 1
        if not target._is_view() and target.is_floating_point():
            target.fill_(float("nan"))
        stream.tasks.append(lambda: target.copy_(source))
        return stream.record_event()


def run(fn, args, *, late: bool, calls: int = 3, **options):
    """Results of each call of one compiled program with fresh arguments, and the lowered program."""
    low = npu_bridge.jit(fn, **options).lower(*args)
    compiled = Compiled(low, "cpu")
    if late:
        compiled.runtime.memory = LateMemory()
    found = []
    for call in range(calls):
        flat = jax.tree.leaves(fresh_arguments(args, call))
        found.append([np.asarray(x) for x in compiled(flat)])
    return found, low


def equal_bits(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b))


def _loss(policy, scanned: bool):
    def layer(x, w):
        return jnp.tanh(checkpoint_name(x @ w, "product")) + x, None

    layer = jax.checkpoint(layer, policy=policy)

    def loss(w, x):
        if scanned:
            return jnp.sum(lax.scan(layer, x, w)[0] ** 2)
        for n in range(LAYERS):
            x, _ = layer(x, w[n])
        return jnp.sum(x**2)

    return jax.value_and_grad(loss)


def offloaded(scanned: bool):
    return _loss(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["product"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        scanned,
    )


def resident(scanned: bool):
    return _loss(jax.checkpoint_policies.save_only_these_names("product"), scanned)


@pytest.mark.parametrize("late", [False, True], ids=["cpu", "side streams"])
@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_offloaded_activations_are_bitwise_equal_to_resident_ones(scanned, late):
    got, low = run(offloaded(scanned), (W, X), late=late)
    want, whole = run(resident(scanned), (W, X), late=False)
    equal_bits(want, got)
    one = X.nbytes
    assert low.memory()["host_bytes"] == LAYERS * one and whole.memory()["host_bytes"] == 0
    text = low.as_text()
    if scanned:
        assert text.count("rt.memory.write(") == 1  # straight from the device to its place in the stack
        assert text.count(" if i") == 1 and text.count("torch.zeros((4, 3, 8)") == 1  # the next round's, fetched ahead
        assert low.memory()["copies"] == 0


def test_offloaded_activations_agree_with_xla():
    call_three_times(offloaded(True), W, X, rtol=1e-4, atol=1e-5)


def adamw_step(state_in, device="cpu"):
    """A step of AdamW whose moments come from, and go back to, the memory of `state_in`."""
    optimizer = optax.adamw(1e-2)

    def step(w, moments, x):
        on_device = jax.tree.map(lambda m: jax.device_put(m, DEVICE), moments) if state_in == "pinned_host" else moments
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
        updates, moments = optimizer.update(gradient, on_device, w)
        return optax.apply_updates(w, updates), moments

    moments = optimizer.init(jnp.asarray(W[0]))
    mesh = AbstractMesh((1,), ("x",))
    there = NamedSharding(mesh, P(), memory_kind=state_in)
    shardings = jax.tree.map(lambda _: there, moments)
    options = {
        "mesh": mesh,
        "in_shardings": (P(), shardings, P()),
        "out_shardings": (P(), shardings),
        "donate_argnums": (0, 1),
        "device": device,
    }
    return npu_bridge.jit(step, **options), moments


@pytest.mark.parametrize("late", [False, True], ids=["cpu", "side streams"])
def test_an_offloaded_optimizer_is_bitwise_equal_to_a_resident_one(late):
    states = []
    for kind in ("pinned_host", "device"):
        step, moments = adamw_step(kind)
        w = jnp.asarray(W[0])
        low = step.lower(w, moments, X)
        compiled = Compiled(low, "cpu")
        if late and kind == "pinned_host":
            compiled.runtime.memory = LateMemory()
        for call in range(4):
            w, moments = jax.tree.unflatten(
                low.traced.out_tree, compiled(jax.tree.leaves((w, moments, np.roll(X, call))))
            )
        assert {m.memory_kind for m in jax.tree.leaves(moments)} == {kind}
        states.append(jax.tree.map(np.asarray, (w, moments)))
        assert (low.memory()["host_bytes"] >= 2 * W[0].nbytes) == (kind == "pinned_host")
    equal_bits(*states)


def test_arrays_keep_their_memory_between_calls():
    mesh = AbstractMesh((1,), ("x",))
    put = npu_bridge.jit(lambda x: jax.device_put(x * 2, HOST), mesh=mesh)
    add = npu_bridge.jit(lambda h: jax.device_put(h, DEVICE) + 1, mesh=mesh)
    for call in range(3):
        held = put(X + call)
        assert held.memory_kind == "pinned_host"
        assert np.array_equal(np.asarray(add(held)), (X + call) * 2 + 1)
        assert "rt.memory.to_device" in add.lower(held).as_text()


def _written_ahead(x):
    def round_(at):
        i, stack = at
        row = jax.device_put(lax.dynamic_slice_in_dim(stack, i, 1), DEVICE)
        return i + 1, lax.dynamic_update_slice_in_dim(stack, jax.device_put(row * 2 + 1, HOST), i + 1, 0)

    last = len(x) - 1
    return jax.device_put(lax.while_loop(lambda at: at[0] < last, round_, (0, jax.device_put(x, HOST)))[1], DEVICE)


MOVES = {
    "there and back": lambda x: jax.device_put(jax.device_put(x * 2, HOST), DEVICE) + 1,
    "overwritten while it is copied": lambda x: (jax.device_put(x * 2, HOST), ((x * 2) + 1) * 3),
    "one value, two results": lambda x: (h := jax.device_put(x + 1, HOST), h),
    "a view of host memory": lambda x: jax.device_put(jax.device_put(jnp.sin(x), HOST)[1:].reshape(-1), DEVICE) * 2,
    "a branch": lambda x: jax.device_put(
        lax.fori_loop(
            0,
            3,
            lambda i, h: lax.cond(i == 1, lambda: jax.device_put(x * 3, HOST), lambda: h),
            jax.device_put(x, HOST),
        ),
        DEVICE,
    ),
    "a loop that turns host memory over": lambda x: jax.device_put(
        lax.fori_loop(
            0, 3, lambda i, h: jax.device_put(jax.device_put(h, DEVICE) * 2 + x, HOST), jax.device_put(x, HOST)
        ),
        DEVICE,
    ),
    "a loop that reads what the last round wrote": _written_ahead,
    "integers and halves": lambda x: (
        jax.device_put(jax.device_put(x.astype(jnp.bfloat16), HOST), DEVICE) * 2,
        jax.device_put(jax.device_put((x > 0).sum(0).astype(jnp.uint32), HOST), DEVICE) + 1,
    ),
    "a number": lambda x: jax.device_put(jax.device_put(x.sum(), HOST), DEVICE) + x,
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_give_what_xla_gives(name):
    call_three_times(MOVES[name], X)
    equal_bits(run(MOVES[name], (X,), late=False)[0], run(MOVES[name], (X,), late=True)[0])


def test_sharded_moments_in_host_memory_on_four_processes(pool):
    def step(w, m, x):
        g = jnp.tanh(x.T @ x) @ w
        m = jax.device_put(m, DEVICE) * 0.9 + g
        return w - m, m

    found = []
    for kind in ("pinned_host", "device"):
        mesh = AbstractMesh((2, 2), ("x", "y"))
        there = NamedSharding(mesh, P("x", "y"), memory_kind=kind)
        low = npu_bridge.jit(
            step, mesh=mesh, in_shardings=(P("x", "y"), there, P("y")), out_shardings=(P("x", "y"), there)
        ).lower(W[0], W[1], np.concatenate([X, X[:1]]))
        assert ("rt.memory.to_host" in low.as_text()) == (kind == "pinned_host")
        found.append(pool.run(low, [W[0], W[1], np.concatenate([X, X[:1]])]))
    equal_bits(found[0], found[1])


REFUSED = {
    "computed on": (
        lambda x: compute_on("device_host")(jax.jit(jnp.sin))(x),
        "compute_on",
    ),
    "read at an index of the device": (
        lambda x, i: jax.device_put(lax.dynamic_slice_in_dim(jax.device_put(x, HOST), i, 1), DEVICE),
        "only the device knows",
    ),
    "updated at an index of the device": (
        lambda x, i: lax.dynamic_update_slice_in_dim(jax.device_put(x, HOST), jax.device_put(x[:1], HOST), i, 0),
        "only the device knows",
    ),
    "a branch of the device": (
        lambda x, i: lax.cond(i > 0, lambda: jax.device_put(x, HOST), lambda: jax.device_put(x + 1, HOST)),
        "branches that the device chooses",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_host_memory_cannot_do_is_refused_by_name(name):
    fn, words = REFUSED[name]
    args = (X, np.int32(1))[: fn.__code__.co_argcount]
    for device in ("cuda", "npu"):
        with pytest.raises(UnsupportedError, match=words):
            npu_bridge.jit(fn, device=device).lower(*args)


def test_computing_in_host_memory_is_refused_on_devices_and_copied_on_a_cpu():

    text = """module { func.func @main(%a: tensor<2xf32> {mhlo.memory_kind = "pinned_host"}) -> tensor<2xf32> {
        %0 = stablehlo.sine %a : tensor<2xf32> return %0 : tensor<2xf32> } }"""
    for device in ("cpu", "npu"):
        with jaxcompat.mlir.make_ir_context(), ir.Location.unknown():
            program = Importer(ir.Module.parse(text), device).run([False])
        if device == "cpu":
            place_values(program, device)
            assert [op.name for op in program.body.ops] == ["place", "sine"]
        else:
            with pytest.raises(UnsupportedError, match="sine at .*: reads a value in host memory"):
                place_values(program, device)
