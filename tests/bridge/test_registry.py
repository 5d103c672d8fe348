"""Every operation has a lowering, and every lowering a test."""

import importlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from npu_bridge.compiler.codegen import printer  # noqa: F401  (fills the registry)
from npu_bridge.compiler.codegen.emitter import LOWERINGS, lowering
from npu_bridge.compiler.importer import NOT_LOWERED, Importer
from npu_bridge.runtime import tensor_ops
from tests.bridge.cases import CASES
from tests.bridge.harness import lower_sharded
from tests.bridge.test_collectives import COLLECTIVES, WAITED_FOR, lower_collective
from tests.bridge.test_operations import lowered

# Made by passes from other collectives, or only with more than one device.
ONLY_SHARDED = {"all_reduce", "all_gather", "all_slice", "all_to_all", "reduce_scatter", "permute", "partition_id",
    "relabel",
    "start_all_gather", "start_reduce_scatter", "start_permute", "start_all_to_all", "wait"}  # fmt: skip


def _dialect_operations() -> set[str]:
    names = set()
    for dialect in ("stablehlo", "chlo", "sdy"):
        module = importlib.import_module(f"jaxlib.mlir.dialects._{dialect}_ops_gen")
        names |= {v.OPERATION_NAME.split(".", 1)[1] for v in vars(module).values() if hasattr(v, "OPERATION_NAME")}
    return names


def test_every_operation_of_the_dialects_is_lowered_or_left_out_for_a_reason():
    imported = {n.removeprefix("_import_") for n in dir(Importer) if n.startswith("_import_")}
    left_out = {word for words in NOT_LOWERED.values() for word in words.split()}
    missing = _dialect_operations() - set(LOWERINGS) - imported - left_out
    assert not missing, f"neither lowered nor named in importer.NOT_LOWERED: {sorted(missing)}"
    both = left_out & set(LOWERINGS)
    assert not both, f"lowered, but named as left out: {sorted(both)}"


@pytest.fixture(scope="module")
def written():
    """Operations and helpers that the cases make the bridge write: on one device and on a mesh, with gradients and
    without.
    """
    one, mesh, text = set(), set(), []
    for name in CASES:
        for found, mesh_too in ((one, False), (mesh, True)):
            low = lowered(name, mesh_too)
            found |= set(low.source.operations)
            text.append(low.as_text())
    for name, overlap in [*((name, True) for name in COLLECTIVES), *WAITED_FOR]:
        low = lower_collective(name, overlap)
        mesh |= set(low.source.operations)
        text.append(low.as_text())
    return one, mesh, "\n".join(text)


def test_every_lowering_is_tested_on_one_device_and_on_a_mesh(written):
    one, mesh, _ = written
    wanted = set(LOWERINGS) - {"callback", "ragged_all_to_all"}  # test_callbacks.py, test_ragged.py
    kernels = {"kernel"}  # fused operators have tests of their own, besides math.* here
    assert not wanted - one - ONLY_SHARDED - kernels, f"no case: {sorted(wanted - one - ONLY_SHARDED)}"
    assert not wanted - mesh, f"no case on a mesh: {sorted(wanted - mesh)}"


def test_every_helper_of_written_programs_is_tested(written):
    helpers = {n for n in tensor_ops.__all__ if callable(getattr(tensor_ops, n))}
    unused = {n for n in helpers if f"T.{n}(" not in written[2]}
    assert not unused, f"helpers that no case makes the bridge write: {sorted(unused)}"


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'add' has two lowerings"):
        lowering("add")(lambda e, op, args: args[0])


def test_a_program_is_written_the_same_for_every_rank_and_every_time():
    def step(x):
        return jax.nn.softmax(x @ x.T, 1).sum(0)

    x = np.ones((4, 8), np.float32)
    first, second = (lower_sharded(step, (x,)).as_text() for _ in range(2))
    assert first == second


_WRITE = """
import hashlib, jax, numpy as np, npu_bridge
def step(x, ws):
    names = {f"w{i}": jax.numpy.sin(ws[i]) for i in range(6)}
    body = lambda c, i: (c + sum(jax.numpy.tanh(w * c) for w in names.values()), c * names["w1"])
    return jax.lax.scan(body, x, None, length=3)
low = npu_bridge.jit(step).lower(np.ones(4, np.float32), [np.ones(4, np.float32)] * 6)
print(hashlib.sha256(low.as_text().encode()).hexdigest())
"""


def test_processes_with_different_hash_seeds_write_one_program():
    # Python seeds the order of string sets per process: if it leaked into the program text, ranks would disagree.
    texts = [
        subprocess.run(
            [sys.executable, "-c", _WRITE],
            env=os.environ | {"PYTHONHASHSEED": seed, "NPU_BRIDGE_CACHE": "off"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1]
