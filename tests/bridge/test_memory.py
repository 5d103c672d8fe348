"""Memory of compiled programs: constants are never overwritten, loops own their buffers, views are declared.

Each is called three times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

import npu_bridge
from npu_bridge.compiler.codegen import printer
from npu_bridge.compiler.codegen.program import walk
from npu_bridge.compiler.ir import MeshShape
from npu_bridge.runtime.api import Compiled
from npu_bridge.runtime.graph import GraphedProgram
from npu_bridge.runtime.mesh import Runtime
from npu_bridge.runtime.program import LoadedProgram
from tests.bridge.cases import CASES
from tests.bridge.harness import Replay, call_three_times, value_and_gradient

D = np.array([1.0, 2.0, 3.0], np.float32)
MASK = np.array([True, False, True])
J = jnp.asarray(D)
X = np.array([0.5, -1.0, 2.0], np.float32)
inner = jax.jit(lambda x: x + jnp.exp(D))

CONSTANTS = {
    "sine": lambda x: x + jnp.sin(D),
    "not": lambda x: jnp.where(~jnp.asarray(MASK), x, 0),
    "times a number": lambda x: x + jnp.asarray(D) * -0.5,
    "sigmoid": lambda x: x * jax.nn.sigmoid(jnp.asarray(D)),
    "log1p": lambda x: x * jnp.log1p(D),
    "closed-over jax array": lambda x: x * jnp.exp(-J),
    "read twice": lambda x: x + jnp.sin(D) * jnp.cos(D),
    "an inner jit called twice": lambda x: inner(inner(x)),
    "within a loop": lambda x: lax.scan(lambda c, _: (c * 0.5 + jnp.tanh(D), None), x, None, length=3)[0],
    "updated": lambda x: jnp.asarray(D).at[1].set(x[0]),
    "start of a carried value": lambda x: lax.fori_loop(0, 3, lambda i, c: c * 2 + x, jnp.asarray(D)),
    "start of two carried values": lambda x: lax.fori_loop(0, 3, lambda i, c: (c[0] * 2 + x, c[1] + c[0]), (J, J)),
    "in a branch": lambda x: lax.cond(x[0] > 0, lambda: jnp.sin(D) + x, lambda: jnp.cos(D) * x),
    "sorted and reduced": lambda x: (jnp.sort(D), jnp.cumsum(D) + x, jnp.flip(D) * x),
    "as a view": lambda x: jnp.asarray(D)[1:].reshape(2, 1) * 2 + x[0],
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_same_in_every_call(name):
    call_three_times(CONSTANTS[name], X)


def test_a_constant_that_is_returned_is_a_copy_that_may_be_donated():
    table = np.array([4.0, 5.0, 6.0], np.float32)
    init = npu_bridge.jit(
        lambda s: {
            "w": jnp.asarray(table),
            "part": jnp.asarray(table)[1:],
            "all": jnp.broadcast_to(table, (2, 3)),
            "n": s + 1,
        }
    )
    step = npu_bridge.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    for n in range(3):
        made = init(np.float32(n))
        assert np.array_equal(np.asarray(made["w"]), table) and np.array_equal(np.asarray(made["part"]), table[1:]), (
            f"call {n}"
        )
        assert np.array_equal(np.asarray(made["all"]), np.broadcast_to(table, (2, 3))) and float(made["n"]) == n + 1
        doubled = step(made)
        assert np.array_equal(np.asarray(doubled["w"]), table * 2)


def _loop(body, start):
    return lambda x: lax.fori_loop(0, 4, lambda i, c: body(c), start(jnp.sin(x)))


LOOPS = {
    "two carried values start from one array": _loop(lambda c: (c[0] * 2 + 1, c[1] + c[0]), lambda z: (z, z)),
    "the first is overwritten, the second is only read": _loop(
        lambda c: (c[0].at[0].set(1.0) * 1.5, c[0] * 0.5, c[1] + c[2]), lambda z: (z, z, z)
    ),
    "one starts in a view of another": _loop(lambda c: (c[0] * 2 + 1, c[1] + c[0][1:]), lambda z: (z, z[1:])),
    "the body reads what a carried value starts from": lambda x: (
        lambda z: lax.fori_loop(0, 4, lambda i, c: c * 0.5 + z, z)
    )(jnp.sin(x)),
    "carried values change places": _loop(lambda c: (c[1] * 2, c[0]), lambda z: (z, z)),
    "a scan over what it carries": lambda x: (lambda z: lax.scan(lambda c, y: (c + y, c), z, jnp.stack([z, z])))(
        jnp.sin(x)
    ),
    "a loop in a loop": lambda x: lax.fori_loop(
        0, 3, lambda i, c: lax.fori_loop(0, 2, lambda j, d: d * 0.5 + c, c), jnp.sin(x)
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_overwrite_only_what_they_own(name):
    call_three_times(LOOPS[name], X)


def test_a_loop_whose_rounds_the_device_decides_owns_its_carried_values():
    def step(x):
        return (lambda z: lax.while_loop(lambda c: (c[0] ** 2).sum() < 50, lambda c: (c[0] * 2, c[1] + c[0]), (z, z)))(
            jnp.cos(x)
        )

    call_three_times(step, X, allow_host_sync=True)


def test_donated_arguments_in_loops_and_beside_constants():
    def step(w, x):
        a, b = lax.fori_loop(0, 3, lambda i, c: (c[0] * 0.5 + x, c[1] + c[0]), (w, w))
        return a + jnp.sin(D), b[1:]

    ours, theirs = npu_bridge.jit(step, donate_argnums=0), jax.jit(step)
    w = v = X
    for n in range(4):
        (w, part), (v, want) = ours(w, X + n), theirs(v, X + n)
        assert np.allclose(np.asarray(w), np.asarray(v), rtol=1e-5), f"call {n}"
        assert np.allclose(np.asarray(part), np.asarray(want), rtol=1e-5), f"call {n}"


def test_replays_keep_constants_and_results_that_lie_in_donated_arguments():
    def step(w, x):
        return w * 0.5 + x, w[1:], jnp.asarray(D), jnp.sin(D) * x

    low = npu_bridge.jit(step, donate_argnums=0).lower(X, X)
    program = LoadedProgram(low.source.text, low.source.constants, [], Runtime(MeshShape()), "step")
    replays = []

    def make(kind):
        replays.append(Replay([w]))
        return replays[-1]

    graphed = GraphedProgram(program, "cpu", [True, False], make_graph=make)
    w, v = torch.from_numpy(X.copy()), X
    kept = []
    for n in range(4):
        x = X + n
        got = graphed([w, torch.from_numpy(x.copy())])
        want = jax.jit(step)(v, x)
        for a, b in zip(got, want):
            assert np.allclose(a.numpy(), np.asarray(b), rtol=1e-6), (n, a, b)
        kept = [(a, np.asarray(b)) for a, b in zip(got[1:], want[1:])] + kept
        for a, b in kept:
            assert np.allclose(a.numpy(), b, rtol=1e-6), "a later replay changed a result of an earlier one"
        with torch.inference_mode():
            got[2].zero_()  # the caller's own
        kept = [k for k in kept if k[0] is not got[2]]
        w, v = got[0], want[0]
    assert replays[0].replays == 3


def _checked(outs, ins, alias):
    """The results of a statement, after those that share memory with an operand were found declared."""

    def memory(t):
        return t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) else 0

    others = {memory(t) for t in ins} - {0}
    for n, out in enumerate(outs if isinstance(outs, (tuple, list)) else (outs,)):
        if isinstance(out, torch.Tensor) and out.numel() and not (alias and n == 0):
            assert memory(out) not in others, "its result lies in the memory of an operand"
            assert not any(s == 0 and size > 1 for s, size in zip(out.stride(), out.shape)), (
                "its result shows an element twice"
            )
    return outs


@pytest.mark.parametrize("name", CASES)
def test_a_statement_says_when_its_result_lies_in_the_memory_of_an_operand(name, monkeypatch):
    from npu_bridge.runtime import tensor_ops

    keep = printer.remove_dead

    def marked(items, live):
        kept = keep(items, live)
        for s in walk(kept):
            s.inplace = []
            s.code = f"T.checked({s.code}, ({''.join(f'{i}, ' for i in s.ins)}), {s.alias is not None})"
        return kept

    monkeypatch.setattr(printer, "remove_dead", marked)
    monkeypatch.setattr(tensor_ops, "checked", _checked, raising=False)
    case = CASES[name]
    low = npu_bridge.jit(value_and_gradient(case.fn, case.grad, case.args), allow_host_sync=case.host_sync).lower(
        *case.args
    )
    Compiled(low, "cpu")(jax.tree.leaves(case.args))
