"""Bookkeeping of captured steps, with a stand-in whose replay runs the recorded step again.

The graphs themselves need a device.
"""

import numpy as np
import pytest
import torch

import npu_bridge
from npu_bridge.compiler.ir import MeshShape
from npu_bridge.runtime.graph import GraphedProgram, pair_donated
from npu_bridge.runtime.mesh import Runtime
from npu_bridge.runtime.program import LoadedProgram
from tests.bridge.harness import Replay


def _program():
    def step(w, x):
        return (w * 0.5 + x, (w * x).sum())

    low = npu_bridge.jit(step, donate_argnums=0).lower(np.ones(4, np.float32), np.ones(4, np.float32))
    return LoadedProgram(low.source.text, low.source.constants, [], Runtime(MeshShape()), "step"), step


def test_a_captured_step_trains_like_the_eager_one():
    program, _step = _program()
    w = torch.ones(4)
    made = []

    def make(kind):
        made.append(Replay([w_now]))
        return made[-1]

    graphed = GraphedProgram(program, "cpu", [True, False], make_graph=make)
    want = np.ones(4, np.float32)
    w_now = w
    for i in range(5):
        x = np.arange(4, dtype=np.float32) + i
        new, total = graphed([w_now, torch.from_numpy(x.copy())])
        expected_total = float((want * x).sum())
        want = want * 0.5 + x
        assert np.allclose(new.numpy(), want), (i, new, want)
        assert abs(float(total) - expected_total) < 1e-4, (i, float(total), expected_total)
        if i == 1:
            kept = total
        w_now = new
    assert made[0].replays == 4 and graphed.status == "one graph"
    assert (
        abs(
            float(kept)
            - float((np.arange(4) * np.array([0.5, 1.5, 2.5, 3.5]) + 0).sum() + np.array([0.5, 1.5, 2.5, 3.5]).sum())
        )
        < 1e-4
    ), "a result of an earlier replay was overwritten by a later one"


def test_a_failed_capture_falls_back_to_eager_and_says_why():
    program, _ = _program()

    class Fails:
        def __init__(self, kind):
            raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedProgram(program, "cpu", [True, False], make_graph=Fails)
    w = torch.ones(4)
    (w, _) = graphed([w, torch.ones(4)])
    with pytest.warns(UserWarning, match="capture failed \\(operation not permitted"):
        (w, _) = graphed([w, torch.ones(4)])
    assert np.allclose(w.numpy(), 1.75) and graphed.status.startswith("eager: capture failed")


def test_a_captured_step_is_told_the_lengths_of_each_batch_and_one_with_too_many_runs_eagerly():
    eager, told = [], []

    def program(args, host):
        eager.append(host[3])
        return [args[0] + 1]

    class Records:
        """Two captured calls read the lengths of rows of 8 places, one of 6."""

        def __init__(self, kind):
            pass

        def capture(self, function):
            results = function()
            return results, [(eager[-1], 8), (eager[-1], 6), (eager[-1], 8)]

        def replay(self, lengths):
            told.append([call["actual_seq_qlen"].tolist() for call in lengths])

    graphed = GraphedProgram(program, "npu", [False], make_graph=Records)
    batches = [
        torch.tensor(rows, dtype=torch.int32) for rows in ([[4, 2], [6, -1]], [[1, 5], [3, 2]], [[6, -1], [2, 2]])
    ]
    for lengths in batches:
        graphed([torch.ones(2)], {3: lengths})
    assert told == [
        [[1, 6, 8, 11, 13, 16], [1, 6, 9, 11, 12], [1, 6, 8, 11, 13, 16]],
        [[6, 8, 10, 12, 16], [6, 8, 10, 12], [6, 8, 10, 12, 16]],
    ]
    assert len(eager) == 2, "the first call, and the capture"
    graphed([torch.ones(2)], {3: torch.ones(300, 5, dtype=torch.int32)})
    assert len(eager) == 3 and len(told) == 2, "1,500 segments: no captured call takes them"


def test_results_are_paired_with_donated_arguments_by_storage_then_by_shape():
    a, b, c = torch.ones(3), torch.ones(3), torch.ones(2)
    assert pair_donated([a, b, c], [True, True, False], [b, torch.ones(3), torch.ones(2)]) == {0: 1, 1: 0}


def test_the_way_steps_run_is_stated():
    fn = npu_bridge.jit(lambda x: x + 1)
    fn(np.ones(3, np.float32))
    ((compiled, _),) = fn._compiled.values()
    assert compiled.execution == "eager: cpu has no graphs"
