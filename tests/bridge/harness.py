"""Run a case through XLA and through the bridge, in one process or on a pool of gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import npu_bridge
from npu_bridge.runtime.api import Jitted, Lowered

MESH = {"x": 2, "y": 2}


def value_and_gradient(fn, grad: bool, args):
    """One program that returns the outputs and, if asked, the gradients of a weighted sum of them."""
    if not grad:
        return lambda *a: (fn(*a), ())
    floats = [i for i, a in enumerate(args) if np.asarray(a).dtype == np.float32]

    def loss(*a):
        out = fn(*a)
        total = 0.0
        for n, leaf in enumerate(jax.tree.leaves(out)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                weight = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + n).reshape(leaf.shape)
                total += jnp.sum(leaf.astype(jnp.float32) * weight)
        return total, out

    def both(*a):
        (_, out), grads = jax.value_and_grad(loss, argnums=tuple(floats), has_aux=True)(*a)
        return out, grads

    return both


def even_spec(x) -> P:
    """Split the first two dimensions over the mesh where they are even."""
    shape = np.shape(x)
    names = [axis if n % 2 == 0 else None for n, axis in zip(shape, ("x", "y"))]
    return P(*names)


def assert_close(want, got, rtol: float, atol: float, what: str) -> None:
    want, got = jax.tree.leaves(want), jax.tree.leaves(got)
    assert len(want) == len(got), f"{what}: {len(want)} results expected, {len(got)} found"
    for n, (a, b) in enumerate(zip(want, got)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what}[{n}]: {a.dtype}{a.shape} expected, {b.dtype}{b.shape} found"
        )
        if a.dtype.kind in "iub":
            assert np.array_equal(a, b), (
                f"{what}[{n}]: {int((a != b).sum())} of {a.size} integers differ, first {a[a != b][:3]} {b[a != b][:3]}"
            )
        else:
            x, y = (v.astype(np.complex128 if v.dtype.kind == "c" else np.float64) for v in (a, b))
            with np.errstate(invalid="ignore"):
                worst = np.nanmax(np.abs(x - y), initial=0.0)
            assert np.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True), (
                f"{what}[{n}]: largest difference {worst:.3g} (rtol {rtol}, atol {atol})"
            )


def fresh_arguments(args, call: int):
    """Return other arguments of the same kind for each call: floats rolled by `call`, integers too if there are no
    floats.

    Rolling keeps every value in the domain of the function.
    """
    leaves, tree = jax.tree.flatten(args)

    def is_float(x):
        return jnp.issubdtype(np.asarray(x).dtype, jnp.floating)

    moves = is_float if any(is_float(x) and np.size(x) > 1 for x in leaves) else lambda x: True

    def turned(x):
        return np.roll(np.asarray(x), call)

    return jax.tree.unflatten(
        tree, [turned(x) if call and moves(x) and isinstance(x, (np.ndarray, jax.Array)) else x for x in leaves]
    )


CALLS = 3  # a program that overwrites its own constants is right in its first call


def call_three_times(fn, *args, rtol: float = 1e-5, atol: float = 1e-6, **options) -> Jitted:
    """Call one compiled program with fresh arguments and compare each call with XLA. Returns the compiled function."""
    ours, theirs = npu_bridge.jit(fn, **options), jax.jit(fn)
    for call in range(CALLS):
        now = fresh_arguments(args, call)
        want = jax.tree.map(np.asarray, theirs(*now))
        assert_close(want, jax.tree.map(np.asarray, ours(*now)), rtol, atol, f"call {call}")
    return ours


class Replay:
    """Stand-in for a device graph: a replay runs the captured step again on the same buffers and writes into the same
    results.
    """

    def __init__(self, watch):
        self.replays, self.watch = 0, watch

    def capture(self, function):
        state = [t.clone() for t in self.watch]
        self.function = function
        self.outs, self.pairs = function()
        for t, s in zip(self.watch, state):
            t.copy_(s)  # a capture does not run
        return (self.outs, self.pairs), []

    def replay(self, lengths):
        self.replays += 1
        outs, _ = self.function()
        for mine, new in zip(self.outs, outs):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)


def portable(low: Lowered) -> dict[str, Any]:
    """Pack a lowered program so that another process can run it."""
    return {
        "source": low.source,
        "mesh": low.mesh,
        "args": low.arg_layouts,
        "results": low.result_layouts,
        "kept": low.traced.kept,
        "dtypes": [np.dtype(a.dtype).name for a in low.traced.out_avals],
        "shapes": [a.shape for a in low.traced.out_avals],
        "in_dtypes": [np.dtype(a.dtype).name for a in low.traced.in_avals],
        "name": low.name,
    }


def _dtype(name: str):
    return (
        np.dtype(getattr(jnp, name))
        if hasattr(jnp, name) and not hasattr(np, name)
        else np.dtype("bool" if name == "bool" else name)
    )


def _run(job: dict[str, Any], flat: list[np.ndarray]) -> Any:
    from npu_bridge.runtime.array import Array
    from npu_bridge.runtime.conversion import to_torch
    from npu_bridge.runtime.mesh import Runtime
    from npu_bridge.runtime.program import LoadedProgram, shard

    axes = {tuple(a) for layout in job["results"] for a in layout if a} | {tuple(a) for a in job["source"].axes_used}
    runtime = Runtime(job["mesh"], "cpu", sorted(axes))
    source = job["source"]
    program = LoadedProgram(
        source.text, source.constants, [k["name"] for k in source.kernels], runtime, job["name"], source.host_arguments
    )

    def place(arrays):
        return [
            shard(
                to_torch(arrays[i].copy(), _dtype(job["in_dtypes"][i])), layout, runtime
            ).contiguous()  # a program may overwrite what is donated
            for i, layout in zip(job["kept"], job["args"])
        ]

    if "batches" in job:
        return _steps(job, program, place(flat), runtime)
    found = []
    for arrays in [flat, *job.get("again", [flat] * (CALLS - 1))]:
        outs = program(place(arrays))
        found.append(
            [
                Array(t, s, _dtype(d), lay, runtime).gather()
                for t, s, d, lay in zip(outs, job["shapes"], job["dtypes"], job["results"])
            ]
        )
    if "again" in job:
        return found
    for call, other in enumerate(found):
        assert all(np.array_equal(_bits(a), _bits(b)) for a, b in zip(found[0], other)), (
            f"call {call} of one program differs from its first call"
        )
    return found[0]


def _bits(x: np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.ascontiguousarray(x)).view(np.uint8)


def _steps(job, program, local, runtime):
    """Several steps of ``state, batch -> state, metrics``: the state stays local.

    Returns metrics of each step and the last state.
    """
    from npu_bridge.runtime.array import Array
    from npu_bridge.runtime.conversion import to_torch
    from npu_bridge.runtime.program import shard

    count = job["state"]
    state, metrics = local[:count], []
    for batch in job["batches"]:
        args = [
            *state,
            *(shard(to_torch(x, x.dtype), lay, runtime).contiguous() for x, lay in zip(batch, job["args"][count:])),
        ]
        del state
        outs = program(args)
        state = outs[:count]
        metrics.append([float(o) for o in outs[count:]])
    whole = [
        Array(t, s, _dtype(d), lay, runtime).gather()
        for t, s, d, lay in zip(state, job["shapes"], job["dtypes"], job["results"])
    ]
    return metrics, whole


def _worker(rank: int, count: int, port: int, jobs, answers) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NPU_BRIDGE_TIMEOUT="60",
    )
    import torch

    torch.set_num_threads(1)
    while (item := jobs.get()) is not None:
        job, flat = item
        try:
            answers.put((rank, _run(job, flat), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))


class Pool:
    """Four processes joined by gloo; each runs the programs it is sent."""

    def __init__(self, count: int = 4):
        import socket

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        # Forked from a process that only imported what a rank needs, which saves three of four imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["npu_bridge.runtime.array", "npu_bridge.runtime.program", __name__])
        self.count = count
        self.jobs = [context.Queue() for _ in range(count)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_worker, args=(r, count, port, self.jobs[r], self.answers), daemon=True)
            for r in range(count)
        ]
        for p in self.processes:
            p.start()

    def steps(self, low: Lowered, state, batches) -> list[Any]:
        """Run a training step over batches. Returns for each rank (metrics of each step, final state)."""
        flat = jax.tree.leaves((state, batches[0]))
        assert low.traced.kept == list(range(len(flat))), "a training step reads all of its arguments"
        return self.run(
            low,
            flat,
            state=len(jax.tree.leaves(state)),
            batches=[[np.asarray(x) for x in jax.tree.leaves(b)] for b in batches],
        )

    def run(self, low: Lowered, flat, **extra: Any) -> list[Any]:
        """Results of every rank, gathered to whole arrays."""
        job = portable(low) | extra
        for q in self.jobs:
            q.put((job, [np.asarray(x) for x in flat]))
        found: dict[int, Any] = {}
        errors = []
        for _ in range(self.count):
            try:
                rank, result, error = self.answers.get(timeout=120)
            except queue.Empty:
                raise AssertionError(
                    f"ranks {set(range(self.count)) - set(found)} gave no answer; errors so far: {errors}"
                ) from None
            found[rank] = result
            if error:
                errors.append(error)
        assert not errors, "\n".join(errors)
        return [found[r] for r in range(self.count)]

    def calls(self, low: Lowered, flats) -> list[list[Any]]:
        """Several calls of one loaded program: for each rank, for each call, its results as whole arrays."""
        first, *rest = flats
        return self.run(low, first, again=[[np.asarray(x) for x in flat] for flat in rest])

    def close(self) -> None:
        for q in self.jobs:
            q.put(None)
        for p in self.processes:
            p.join(timeout=10)
            if p.is_alive():
                p.terminate()


def lower_sharded(fn, args, **options) -> Lowered:
    return npu_bridge.jit(fn, mesh=MESH, in_shardings=tuple(even_spec(a) for a in args), **options).lower(*args)
