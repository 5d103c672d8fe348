"""Every case runs on its smallest shapes, its sides agree, and the command line runs it and reports errors."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import memory, ours, twin, workloads
from benchmarks.measure import Comparison, Side, measure
from benchmarks.registry import CASES, Case, Settings, load_cases

ROOT = Path(__file__).resolve().parents[2]
load_cases()
# Cases run in full here; `python -m benchmarks run --dry` runs all.
STARTED = ["images", "loader", "packing", "weights", "training-step"]


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """Compile without optimisation: results matter here, speed does not."""
    before, threads = jax.config.read("jax_disable_most_optimizations"), torch.get_num_threads()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", STARTED)
def test_case_starts_and_its_sides_agree(name):
    measured = [measure(comparison, seconds=0.0, least=2) for comparison in CASES[name].build(Settings.smallest())]
    assert measured
    for comparison in measured:
        assert len(comparison["sides"]) > 1 and len(comparison["ratios"]) == len(comparison["sides"]) - 1
        assert all(ratio["value"] > 0 for ratio in comparison["ratios"])
        json.dumps(comparison)


@pytest.fixture(scope="module")
def trained():
    config = workloads.dry_config("float32")
    parameters = ours.initial(config)
    other = twin.make(config, parameters)
    packed = workloads.build(workloads.DRY, config, other)
    return config, parameters, other, packed


def test_packed_and_padded_inputs_of_the_twin_hold_the_same_samples(trained):
    config, _, other, packed = trained
    a, b = twin.packed_inputs(packed), twin.padded_inputs(packed.samples, config, other)
    other.attend_by("sdpa")
    with torch.no_grad():
        losses = [other.loss(inputs).item() for inputs in (a, b)]
    # Means over the same labels; float32 sums in another order.
    assert abs(losses[0] - losses[1]) / losses[0] < 1e-5, f"packed {losses[0]}, padded {losses[1]}"
    assert (a["labels"] >= 0).sum() == (b["labels"] >= 0).sum() == (packed.batch.loss_weights > 0).sum()
    assert b["input_ids"].shape[0] == len(packed.samples) > a["input_ids"].shape[0]


def test_samples_that_share_a_row_do_not_see_each_other_in_the_twin(trained):
    _, _, _, packed = trained
    mask = twin.packed_inputs(packed)["attention_mask"][0, 0]
    first, second = (torch.tensor(packed.batch.segment_ids[0] == number) for number in (1, 2))
    assert mask[first][:, first].any() and not mask[second][:, first].any() and not mask[first][:, second].any()


def test_sides_that_do_other_work_are_refused(trained):
    with pytest.raises(AssertionError, match="step 1: loss difference to other is 1.00e-03"):
        ours.agree(lambda: (2.002, 1.0), {"other": lambda: (2.0, 1.0)}, tolerance=1e-4)
    with pytest.raises(AssertionError, match="gradient norm"):
        ours.agree(lambda: (2.0, 1.01), {"other": lambda: (2.0, 1.0)}, tolerance=1e-4)
    with pytest.raises(AssertionError, match="nan"):
        ours.agree(lambda: (float("nan"), 1.0), {"other": lambda: (2.0, 1.0)}, tolerance=1e-4)


def test_torch_model_written_by_hand_computes_the_twins_loss(trained):
    from benchmarks.handwritten import Handwritten

    config, parameters, other, packed = trained
    other.attend_by("eager")
    with torch.no_grad():
        by_hand = Handwritten(config, parameters, packed.batch).loss().item()
        theirs = other.loss(twin.eager_masks(twin.packed_inputs(packed))).item()
    assert abs(by_hand - theirs) / theirs < 1e-5, f"by hand {by_hand}, transformers {theirs}"


def test_small_model_has_about_sixty_million_parameters_and_tiny_about_three():
    from mindvl_jax.models.outline import outline_of

    def count(config):
        return sum(shape.size for shape in outline_of(config).shapes.values()) / 1e6

    assert 50 < count(workloads.small_config("float32")) < 70 and 2 < count(workloads.tiny_config("float32")) < 4


def test_the_batch_of_the_emulated_suite_is_full_and_its_lengths_are_those_of_its_segments():
    from benchmarks import npu

    model = npu.slice_of(1, 1)
    _, batch = npu.batch_of(model)
    for ids, lengths in (
        (batch.segment_ids, batch.segment_lengths),
        (batch.patch_segment_ids, batch.image_lengths),
        (batch.patch_window_ids, batch.window_lengths),
    ):
        counts = np.bincount(ids[0])
        assert counts[0] == 0 and np.array_equal(counts[1:], lengths[0][lengths[0] >= 0])
    assert model.text.num_layers == 1 and model.vision.depth == 1 and model.vision.fullatt_block_indexes == (0,)


def test_the_emulated_suite_says_how_its_environment_is_made(monkeypatch, tmp_path):
    from benchmarks.cases import npu

    monkeypatch.setattr(npu, "ENVIRONMENT", tmp_path / ".venv-npu")
    with pytest.raises(SystemExit, match="make setup-npu"):
        npu.in_emulator("hand", 1, 1)


@pytest.mark.parametrize("one_core, clock", [(True, "cpu"), (False, "wall")])
def test_one_core_measures_processor_time(one_core, clock, monkeypatch, tmp_path):
    comparison = Comparison(
        "both wait", [Side(name, lambda: time.sleep(0.02), {"items": 1.0}) for name in "ab"], unit="items"
    )
    monkeypatch.setattr(command, "load_cases", lambda: {"x": Case("x", "cpu", "", lambda settings: iter([comparison]))})
    monkeypatch.setattr(command.machine, "use_threads", lambda count: None)
    assert command._case("x", Settings(seconds=0.0, least=2, one_core=one_core), tmp_path / "out") == 0
    (measured,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
    # Sleeping takes no processor time.
    assert measured["clock"] == clock and (measured["sides"][0]["median"] < 0.015) == one_core, measured["sides"][0]


def test_peak_memory_is_seen():
    memory.trim()
    before = memory.anonymous_bytes()
    with memory.Peak() as peak:
        block = bytearray(b"x" * (64 << 20))
        deadline = time.monotonic() + 60
        while peak.peak < before + len(block) and time.monotonic() < deadline:
            time.sleep(0.01)  # until the watching thread has run
        del block
    # b"x" * n and the bytearray are alive together for a moment.
    assert 60 << 20 < peak.peak - before < 200 << 20, f"{(peak.peak - before) >> 20} MiB"


def test_command_line_names_what_it_does_not_know(capsys):
    assert command.main(["run", "--only", "imagse"]) == 2
    assert "imagse" in capsys.readouterr().out
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CASES)


def test_run_leaves_a_page_and_a_file_and_reports_a_broken_case(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--only", "packing", "--dry", "--out", str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.html")
    record = json.loads(stored.read_text())
    assert (
        record["cases"]["packing"]["comparisons"] and record["settings"]["dry"] and "mean nothing" in page.read_text()
    )
    assert str(ROOT) not in stored.read_text()
