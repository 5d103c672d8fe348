"""Allowed changes between a checkpoint and its continuation resume exactly; others are refused, and so is a
checkpoint that was tampered with.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.training.trainer import train

FIELDS = ("step", "loss", "grad_norm", "tokens", "samples", "epochs")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: Path(run_dir) / "report.html")


@pytest.fixture(scope="module")
def begun(assets, tmp_path_factory):
    """Data of its own and a run of two phases, stopped inside the second: (folder, configuration as plain data)."""
    from tests.training.conftest import configuration

    folder = tmp_path_factory.mktemp("begun")
    shutil.copy(assets / "squares.parquet", folder)
    shutil.copy(assets / "tokenizer.json", folder)
    mapping = configuration(
        folder, folder / "run", {"steps": 2}, {"steps": 4}, checkpoint={"every_steps": 1, "keep": 99}
    )
    train(config_loader.from_mapping(mapping), stop_after=4)
    return folder, mapping


@pytest.fixture
def copied(begun, tmp_path):
    """The begun run with its data in a folder of its own, and its configuration there."""
    folder, mapping = begun
    shutil.copytree(folder, tmp_path / "own")
    return json.loads(json.dumps(mapping).replace(str(folder), str(tmp_path / "own"))), tmp_path / "own"


def lines(mapping):
    with open(Path(mapping["run"]["dir"]) / "metrics.jsonl", encoding="utf-8") as file:
        return [[json.loads(line)[key] for key in FIELDS] for line in file]


def test_a_phase_made_longer_goes_on_as_if_it_had_been_planned_so(run_mapping, run_config):
    """Constant rate, so that nothing but the data could differ; the shorter run had ended, with its report."""
    longer = run_mapping({"steps": 4}, name="longer")
    train(config_loader.from_mapping(longer))
    longer["training"]["phases"][0]["steps"] = 7
    train(config_loader.from_mapping(longer))
    planned = run_mapping({"steps": 7}, name="planned")
    train(config_loader.from_mapping(planned))
    assert lines(longer) == lines(planned)


def test_data_moved_elsewhere_are_the_same_data(copied):
    mapping, folder = copied
    train(config_loader.from_mapping(mapping), stop_after=5)


def reorder(mapping, folder):
    table = pq.read_table(folder / "squares.parquet")
    pq.write_table(table.take(list(range(1, len(table))) + [0]), folder / "squares.parquet")


def set_phase(index, **values):
    return lambda mapping, folder: mapping["training"]["phases"][index].update(values)


def another_vocabulary(mapping, folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


CHANGES = {
    "the same records in another order": (reorder, "same number of records with another content or in another order"),
    "fewer records": (
        lambda mapping, folder: mapping["data"]["sources"]["squares"].update(max_samples=20),
        "had 48 records, now 20",
    ),
    "another weight": (set_phase(1, mixture=[{"source": "squares", "weight": 2.0}]), "weight of squares was 1, now 2"),
    "another seed": (lambda mapping, folder: mapping["run"].update(seed=4), "run.seed is 4"),
    "another vocabulary": (another_vocabulary, "another tokenizer"),
    "more steps of a phase that is over": (set_phase(0, steps=3), r"(?s)past phases.*steps: 2 -> 3"),
    "another rate of a phase that is over": (set_phase(0, learning_rate=1.0), r"(?s)past phases.*learning_rate"),
    "moments carried over, when the phase has begun": (set_phase(1, keep_optimizer=True), "keep_optimizer has changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_would_give_other_data_is_refused(copied, name):
    mapping, folder = copied
    change, message = CHANGES[name]
    change(mapping, folder)
    with pytest.raises(UserError, match=message):
        train(config_loader.from_mapping(mapping), stop_after=5)


TAMPERED = {
    "data position": lambda record: record["loader"]["planner"].update(
        position=record["loader"]["planner"]["position"] + 1
    ),
    "waiting list": lambda record: record["loader"]["planner"]["waiting"].reverse(),
    "phase step": lambda record: record.update(phase_step=record["phase_step"] - 1),
    "step": lambda record: record.update(step=record["step"] + 1),
    "phase": lambda record: record.update(phase=0, phase_name="phase0", phase_step=2),
    "totals": lambda record: record["totals"].update(tokens=0),
    "quarantine": lambda record: record["loader"]["decoding"].update(in_a_row=5),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_checkpoint_whose_progress_was_changed_counts_as_damaged(copied, name):
    mapping, folder = copied
    checkpoints = folder / "run" / "checkpoints"
    for step in (1, 2, 3):
        shutil.rmtree(checkpoints / str(step))
    file = next(
        file for file in (checkpoints / "4" / "progress").iterdir() if '"loader"' in file.read_text(errors="replace")
    )
    record = json.loads(file.read_text())
    TAMPERED[name](record)
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="seal does not fit"):
        train(config_loader.from_mapping(mapping), stop_after=5)


def test_a_changed_configuration_inside_a_checkpoint_counts_as_damage(copied):
    mapping, folder = copied
    for step in (1, 2, 3):
        shutil.rmtree(folder / "run" / "checkpoints" / str(step))
    file = next(
        file
        for file in (folder / "run" / "checkpoints" / "4" / "config").iterdir()
        if '"training"' in file.read_text(errors="replace")
    )
    file.write_text(
        file.read_text()
        .replace('"weight_decay": 0.0', '"weight_decay": 0.1')
        .replace('"weight_decay":0.0', '"weight_decay":0.1')
    )
    with pytest.raises(UserError, match="seal does not fit"):
        train(config_loader.from_mapping(mapping), stop_after=5)


def take_seal(folder, step):
    for file in (folder / "run" / "checkpoints" / str(step) / "progress").iterdir():
        if '"seal"' in file.read_text(errors="replace"):
            record = json.loads(file.read_text())
            del record["seal"]
            record["loader"]["planner"]["waiting"].reverse()
            file.write_text(json.dumps(record))


def test_a_checkpoint_whose_seal_was_taken_away_is_passed_over(copied):
    mapping, folder = copied
    take_seal(folder, 4)
    train(config_loader.from_mapping(mapping), stop_after=5)
    log = (folder / "run" / "run.log").read_text()
    assert "its seal was taken away" in log and "continuing" in log and "checkpoints/3" in log


def test_a_run_without_any_seal_says_so(copied, caplog):
    mapping, folder = copied
    for step in (1, 2, 3):
        shutil.rmtree(folder / "run" / "checkpoints" / str(step))
    take_seal(folder, 4)
    train(config_loader.from_mapping(mapping), stop_after=5)
    assert "has no seal" in caplog.text and "cannot be checked" in caplog.text
