"""Host-known values: counters, mesh positions, constant tables. Only the chosen branch of a host value runs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import npu_bridge
from tests.bridge.harness import MESH, assert_close, call_three_times

X = np.linspace(-1, 2, 6, dtype=np.float32)
TABLE = np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1]], np.int32)
ACTIONS = [lambda c: c, lambda c: jnp.sin(c), lambda c: c * 2 + 1]


def text(fn, *args, **options):
    return call_three_times(fn, *args, **options).lower(*args).as_text()


def test_a_branch_on_a_counter_runs_alone():
    def step(x):
        return lax.fori_loop(0, 5, lambda i, c: lax.cond(i % 2 == 0, jnp.sin, lambda c: c * 2 + 1, c), x)

    written = text(step, X)
    assert "if " in written and "else:" in written and "torch.where" not in written, written
    assert written.count("sin") == 1 and "torch.full" not in written, (
        "nothing of the counter is on the device\n" + written
    )


def test_a_constant_table_is_looked_up_by_the_host():
    def step(x):
        return lax.fori_loop(0, 3, lambda k, c: lax.switch(jnp.asarray(TABLE)[k, (k + 1) % 3], ACTIONS, c), x)

    written = text(step, X)
    assert "TABLE0 = (0, 1, 2, 2, 1, 0, 1, 1, 1)" in written and "K[" not in written and "torch.where" not in written, (
        written
    )


def test_a_table_that_is_scanned_over_gives_numbers_of_the_host():
    kinds = np.array([2, 0, 1, 1], np.int32)
    written = text(lambda x: lax.scan(lambda c, k: (lax.switch(k, ACTIONS, c), k), x, kinds), X)
    assert "if " in written and "torch.where" not in written, written


def test_what_a_loop_carries_may_be_a_number_of_the_host():
    def step(x):
        def body(i, c):
            a, b, y = c
            return b, (a + b) % 4, lax.cond(a > b, jnp.cos, lambda y: y + 1, y)

        return lax.fori_loop(0, 6, body, (jnp.int32(1), jnp.int32(1), x))

    written = text(step, X)
    assert "torch.where" not in written and "if " in written, written


def test_a_carried_number_that_turns_into_one_of_the_device_is_a_tensor():
    def step(x):
        return lax.fori_loop(0, 3, lambda i, c: (c[0] + c[1].astype(jnp.int32)[0], c[1] * 1.5), (jnp.int32(2), x + 2))

    text(step, X)


def test_a_branch_hands_on_what_it_was_given_without_a_copy_and_overwrites_what_nobody_reads():
    def step(x):
        buffer = jnp.tanh(x)
        return lax.fori_loop(
            0,
            4,
            lambda i, c: lax.cond(i < 2, lambda c: (c[0].at[i].set(9.0), c[1]), lambda c: (c[0], c[1] * 0.5), c),
            (buffer, buffer),
        )

    fn = call_three_times(step, X)
    low = fn.lower(X)
    assert low.memory()["copies"] == 1, "only one of the two that start from one array\n" + low.as_text()


def test_branches_leave_outer_values_alone_that_are_read_later():
    def step(x):
        y = jnp.tanh(x)

        def body(i, c):
            return lax.cond(i == 1, lambda c: (c[0] + y, c[0]), lambda c: (c[1] * 2, y), c)

        a, b = lax.fori_loop(0, 3, body, (y, y))
        return a, b, y

    text(step, X)


def test_select_by_a_number_of_the_host_takes_one_side():
    written = text(lambda x: lax.fori_loop(0, 4, lambda i, c: jnp.where(i > 1, c + 1, jnp.sin(c)), x), X)
    assert "torch.where" not in written and "torch.full" not in written, written


def test_nested_loops_and_branches():
    def step(x):
        def inner(i, c):
            return lax.fori_loop(
                0,
                3,
                lambda j, d: lax.cond(
                    (i + j) % 2 == 0, lambda d: d * 1.5, lambda d: lax.cond(j > i, jnp.sin, jnp.cos, d), d
                ),
                c,
            )

        return lax.fori_loop(0, 3, inner, x)

    assert "torch.where" not in text(step, X)


def test_the_gradient_of_a_chosen_branch_is_chosen_as_well():
    def loss(x):
        def body(c, k):
            return (lax.switch(k, ACTIONS, c), None)

        return lax.scan(body, x, np.array([1, 2, 0, 1], np.int32))[0].sum()

    written = text(jax.value_and_grad(loss), X)
    assert "torch.where" not in written, written


def test_each_device_runs_its_own_branch(pool):
    """Every stage counts what it runs: one sine on the first row of devices, a product on the second."""
    A = np.arange(32, dtype=np.float32).reshape(4, 8) / 8

    def inside(a):
        a = lax.cond(lax.axis_index("x") == 0, lambda a: lax.psum(jnp.sin(a), "y"), lambda a: lax.psum(a * 2, "y"), a)
        return lax.ppermute(a, "x", [(0, 1), (1, 0)])

    def step(a):
        return jax.shard_map(inside, in_specs=P("x", "y"), out_specs=P("x"), check_vma=False)(a)

    low = npu_bridge.jit(step, mesh=MESH, in_shardings=(P("x", "y"),), out_shardings=P("x")).lower(A)
    written = low.as_text()
    assert "if " in written and "torch.where" not in written, written
    top, bottom = np.sin(A[:2]), A[2:] * 2
    want = np.concatenate([(bottom[:, :4] + bottom[:, 4:]), (top[:, :4] + top[:, 4:])])
    for rank, (got,) in enumerate(pool.run(low, [A])):
        assert_close([want], [got], 1e-6, 1e-6, f"rank {rank}")


def test_only_the_own_branch_is_executed():
    """Counted: what torch runs in a loop over four kinds of work is what the table asks for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            self.seen[name] = self.seen.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    order = np.array([0, 1, 1, 3, 2, 1], np.int32)
    work = [lambda c: c, jnp.sin, jnp.cos, lambda c: jnp.tanh(c)]
    step = npu_bridge.jit(lambda x: lax.scan(lambda c, k: (lax.switch(k, work, c), None), x, order)[0])
    step(X)
    with Count() as count:
        step(X)
    counted = {name: sum(n for k, n in count.seen.items() if k.strip("_") == name) for name in ("sin", "cos", "tanh")}
    assert counted == {"sin": 3, "cos": 1, "tanh": 1}, count.seen
