"""Overlap of collectives with computation: early starts, late waits, unchanged results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.compiler.passes.overlap import AHEAD
from tests.bridge import decoder
from tests.bridge.harness import assert_close
from tests.bridge.test_training import STEPS, _batches, _loss_gap, _xla

R = np.random.RandomState(0)
_MESH = {"fsdp": 4}
_START = re.compile(r"(v\d+) = rt\.start_(all_gather|reduce_scatter|permute|all_to_all)\(")


def f32(*shape):
    return R.uniform(-1, 1, shape).astype(np.float32)


def decoder_step(c, **options):
    step, state = decoder.make(c)
    data = jax.tree.map(lambda _: P("fsdp"), decoder.batch(c))
    fn = npu_bridge.jit(
        step,
        mesh=decoder.MESH,
        in_shardings=(decoder.specs(state), data),
        out_shardings=(decoder.specs(state), P()),
        donate_argnums=0,
        **options,
    )
    return fn.lower(state, decoder.batch(c)), state


def spans(text: str) -> list[tuple[str, int, int]]:
    """(kind, line of the start, line of the wait) of every exchange that runs beside the computation."""
    lines = text.splitlines()
    begun = {m[1]: (m[2], n) for n, line in enumerate(lines) if (m := _START.search(line))}
    found = []
    for n, line in enumerate(lines):
        if m := re.search(r"= (v\d+)\.wait\(\)", line):
            kind, start = begun.pop(m[1])
            found.append((kind, start, n))
    assert not begun, f"started and never waited for: {begun}"
    return found


def products_between(text: str, start: int, end: int) -> int:
    return sum(
        any(word in line for word in ("torch.mm(", "torch.bmm(", "rt.kernel.")) for line in text.splitlines()[start:end]
    )


def most_under_way(found, kind: str) -> int:
    events = sorted((n, step) for k, a, b in found if k == kind for n, step in ((a, 1), (b, -1)))
    now = worst = 0
    for _, step in events:
        now += step
        worst = max(worst, now)
    return worst


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_weights_are_gathered_while_the_computation_before_their_first_use_runs(scan):
    low, _ = decoder_step(decoder.Config(fused=True, scan=scan, layers=3))
    text, found = low.as_text(), spans(low.as_text())
    gathers = [(a, b) for kind, a, b in found if kind == "all_gather"]
    hidden = sum(products_between(text, a, b) > 0 for a, b in gathers)
    # Not hidden: what the first operations of the program and of a loop's body read, because nothing crosses a round.
    assert hidden >= len(gathers) * (0.75 if scan else 0.85), (
        f"{hidden} of {len(gathers)} gathers have computation beside them"
    )
    scatters = [(a, b) for kind, a, b in found if kind == "reduce_scatter"]
    hidden = sum(products_between(text, a, b) > 0 for a, b in scatters)
    assert hidden >= len(scatters) * 0.75, f"{hidden} of {len(scatters)} scatters have computation beside them"
    for kind in ("all_gather", "reduce_scatter"):
        assert most_under_way(found, kind) == AHEAD, f"{most_under_way(found, kind)} of {kind} under way at once"


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_overlap_costs_no_more_memory_than_what_is_under_way(scan):
    c = decoder.Config(fused=True, scan=scan, layers=4)
    (early, _), (plain, _) = decoder_step(c), decoder_step(c, overlap=False)
    assert "rt.start_" not in plain.as_text() and all(e["waits"] for e in plain.collectives())

    def exchanged(low):
        return sorted((e["kind"], e["axes"], e["shape"], e["bytes"], e["times"]) for e in low.collectives())

    assert exchanged(early) == exchanged(plain), "the same exchanges, only at other times"
    largest = max(int(np.prod(e["shape"])) * 4 for e in early.collectives() if not e["waits"])
    # A gather holds its result; a scatter what it was given and a copy of it in the order of the shards.
    allowed = AHEAD * largest + AHEAD * 2 * largest
    more = early.memory()["peak_bytes"] - plain.memory()["peak_bytes"]
    assert more <= allowed, f"{more} bytes more than a program that waits for every exchange, {allowed} allowed"
    assert early.memory()["copies"] == 0, early.memory()


def test_unrolled_layers_with_overlap_train_like_xla_on_four_processes(pool):
    c = decoder.Config(fused=True, scan=False)
    low, state = decoder_step(c)
    assert any(kind == "reduce_scatter" for kind, _, _ in spans(low.as_text()))
    want, _ = _xla(c)
    for rank, (metrics, _) in enumerate(pool.steps(low, state, _batches(c))):
        gap = _loss_gap([m[1] for m in metrics], want)
        assert gap < 1e-5, (
            f"rank {rank}: loss differs by {gap:.2e} relative over {STEPS} steps"
        )  # float32; usually near 1e-7


def test_a_weight_is_not_overwritten_while_its_gather_is_under_way(pool):
    """The update of a donated weight needs nothing of the product, so only the gather holds it back."""

    def fn(w, v, x):
        y = jnp.tanh(x @ v) @ jax.lax.with_sharding_constraint(w, P())
        return w - 1.0, v, y.sum()

    w, v, x = f32(64, 8), f32(8, 64), f32(4, 8)
    low = npu_bridge.jit(
        fn, mesh=_MESH, in_shardings=(P("fsdp"), P(), P()), out_shardings=(P("fsdp"), P(), P()), donate_argnums=0
    ).lower(w, v, x)
    lines = low.as_text().splitlines()
    ((_, start, end),) = (s for s in spans(low.as_text()) if s[0] == "all_gather")
    update = next(n for n, line in enumerate(lines) if "a0.sub_(" in line)
    assert start < end < update, low.as_text()
    for got in pool.run(low, [w, v, x]):
        assert_close((w - 1, v, (np.tanh(x @ v) @ w).sum()), got, 1e-5, 1e-4, "weight and product")


def test_a_gather_read_behind_a_loop_starts_behind_it():
    def fn(w, x):
        x = jax.lax.fori_loop(0, 3, lambda _, c: jnp.sin(c), x)
        return x @ jax.lax.with_sharding_constraint(w, P())

    low = npu_bridge.jit(fn, mesh=_MESH, in_shardings=(P("fsdp"), P()), out_shardings=P()).lower(f32(8, 8), f32(4, 8))
    lines = low.as_text().splitlines()
    ((_, start, _),) = spans(low.as_text())
    assert start > next(n for n, line in enumerate(lines) if "for " in line), low.as_text()


def test_a_gather_of_what_another_gather_brings_waits_for_it(pool):
    def fn(a):
        rows = jax.lax.with_sharding_constraint(jnp.sin(a), P("x"))
        columns = jax.lax.with_sharding_constraint(rows.astype(jnp.bfloat16).T, P("x")).astype(jnp.float32)
        return jax.lax.with_sharding_constraint(columns, P()) @ a

    a = f32(8, 8)
    low = npu_bridge.jit(fn, mesh={"x": 2, "y": 2}, in_shardings=(P("x", "y"),), out_shardings=P("x", "y")).lower(a)
    want = np.asarray(jax.jit(lambda a: jnp.sin(a).astype(jnp.bfloat16).T.astype(jnp.float32) @ a)(a))
    for got in pool.run(low, [a]):
        assert_close([want], got, 1e-5, 1e-5, "two gathers")


def _mapped(fn, specs, out):
    return lambda *a: jax.shard_map(
        fn, mesh=jax.sharding.get_abstract_mesh(), in_specs=specs, out_specs=out, check_vma=False
    )(*a)


RING = [(i, (i + 1) % 4) for i in range(4)]


def _ring(k, w):
    """Scan over a ring: the next keys are sent while those at hand are multiplied."""

    def one(carry, _):
        k, total = carry
        return (jax.lax.ppermute(k, "fsdp", RING), total + jnp.tanh(k @ w) @ w.T), None

    return jax.lax.scan(one, (k, jnp.zeros_like(k)), None, length=4)[0][1]


def _both_ways(x, w):
    """A tick of a pipeline: forward, backward, then both are sent on; each is needed a round later."""

    def tick(carry, _):
        x, g = carry
        y, h = jnp.tanh(x @ w), jnp.sin(g @ w.T)
        return (jax.lax.ppermute(y, "fsdp", RING), jax.lax.ppermute(h, "fsdp", [(b, a) for a, b in RING])), None

    return sum(jax.lax.scan(tick, (x, x * 2), None, length=5)[0])


def _ulysses(x, w):
    """Rows to columns and back: each of three travels while the next is made."""
    q, k, v = (jax.lax.all_to_all(jnp.tanh(x @ (w * n)), "fsdp", 1, 0, tiled=True) for n in (1.0, 2.0, 3.0))
    return jax.lax.all_to_all(q * jnp.sin(k) + v, "fsdp", 0, 1, tiled=True)


@pytest.mark.parametrize(
    ("fn", "count", "hidden"),
    [(_ring, 1, 1), (_both_ways, 2, 1), (_ulysses, 4, 2)],
    ids=["ring in a scan", "pipeline", "all_to_all"],
)
def test_what_is_handed_on_travels_beside_the_computation(fn, count, hidden, pool):
    x, w = f32(16, 8), f32(8, 8)
    specs = (P("fsdp"), P())
    low = npu_bridge.jit(_mapped(fn, specs, P("fsdp")), mesh=_MESH, in_shardings=specs, out_shardings=P("fsdp")).lower(
        x, w
    )
    found = spans(low.as_text())
    beside = sum(products_between(low.as_text(), a, b) > 0 for _, a, b in found)
    assert len(found) == count and beside == hidden, low.as_text()
    assert all(not e["waits"] for e in low.collectives())
    calls = [(np.roll(x, n), np.roll(w, n)) for n in range(3)]
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        want = [np.asarray(jax.jit(_mapped(fn, specs, P("fsdp")))(*a)) for a in calls]
    for rank, results in enumerate(pool.calls(low, calls)):
        for call, (a, (b,)) in enumerate(zip(want, results, strict=True)):
            assert_close([a], [b], 1e-5, 1e-5, f"rank {rank}, call {call}")


def test_what_is_under_way_is_not_overwritten_and_a_permute_of_a_permute_waits(pool):
    def fn(x, w):
        y = jnp.tanh(x)
        moved = jax.lax.ppermute(y, "fsdp", RING)
        twice = jax.lax.ppermute(moved.T, "fsdp", RING)
        z = y * 3 + 1  # could be written into y
        at_once = jax.lax.ppermute(jax.lax.ppermute(z, "fsdp", RING), "fsdp", RING)
        return z @ w + moved + twice.T + at_once

    x, w = f32(16, 8), f32(8, 8)
    specs = (P("fsdp"), P())
    low = npu_bridge.jit(_mapped(fn, specs, P("fsdp")), mesh=_MESH, in_shardings=specs, out_shardings=P("fsdp")).lower(
        x, w
    )
    y = np.tanh(x)
    want = (y * 3 + 1) @ w + np.roll(y, 4, 0) + np.roll(y, 8, 0) + np.roll(y * 3 + 1, 8, 0)
    for results in pool.calls(low, [(x, w)] * 3):
        for (got,) in results:
            assert_close([want], [got], 1e-5, 1e-5, "permutes")


def test_a_wait_that_fails_names_the_exchange():
    import torch

    from npu_bridge.compiler.ir import MeshShape
    from npu_bridge.errors import CollectiveError
    from npu_bridge.runtime.mesh import Runtime

    class Dead:
        def wait(self):
            raise RuntimeError("connection closed by peer")

    rt = Runtime(MeshShape())
    under_way = rt._start("all_gather", torch.zeros(2, 3), ("fsdp",), Dead, lambda: None, ())
    with pytest.raises(
        CollectiveError,
        match=r"all_gather number 1 over \('fsdp',\) of \(2, 3\) torch.float32 failed or timed out .* closed by peer",
    ):
        under_way.wait()
