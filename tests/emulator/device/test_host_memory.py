"""Offloaded programs on torch_npu's streams, events and pinned memory: the same bits as resident ones."""

import jax
import jax.numpy as jnp
import numpy as np
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

from npu_bridge.runtime.api import Compiled
from tests.bridge import test_host_memory as cases
from tests.bridge.harness import fresh_arguments


def results(fn, args, calls=3):
    low = cases.npu_bridge.jit(fn, device="npu").lower(*args)
    compiled = Compiled(low, "npu")
    found = [[np.asarray(x) for x in compiled(jax.tree.leaves(fresh_arguments(args, call)))] for call in range(calls)]
    return found, compiled


def test_offloaded_activations_are_those_of_a_resident_step():
    for scanned in (True, False):
        got, compiled = results(cases.offloaded(scanned), (cases.W, cases.X))
        want, _ = results(cases.resident(scanned), (cases.W, cases.X))
        cases.equal_bits(want, got)
        assert compiled.execution == "eager: values move between the device's and the host's memory"


def test_an_offloaded_optimizer_is_a_resident_one():
    states = []
    for kind in ("pinned_host", "device"):
        step, moments = cases.adamw_step(kind, device="npu")
        w = jnp.asarray(cases.W[0])
        for call in range(4):
            w, moments = step(w, moments, np.roll(cases.X, call))
        assert {m.memory_kind for m in jax.tree.leaves(moments)} == {kind}
        if kind == "pinned_host":
            assert all(m.local.is_pinned() for m in jax.tree.leaves(moments))
        states.append(jax.tree.map(np.asarray, (w, moments)))
    cases.equal_bits(*states)


def test_other_moves_give_what_the_cpu_gives():
    for name, fn in cases.MOVES.items():
        want, _ = cases.run(fn, (cases.X,), late=False)
        got, _ = results(fn, (cases.X,))
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            assert np.allclose(np.float32(a), np.float32(b), rtol=1e-5), name
