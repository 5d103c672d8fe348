"""Whole runs on the tiny model: phases, resuming to the bit, other meshes, signals, bad steps."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.run import evaluate_run
from mindvl_jax.models.loading import make_loader
from mindvl_jax.models.outline import outline_of
from mindvl_jax.training import trainer
from mindvl_jax.training.devices import chosen_mesh
from mindvl_jax.training.display import print_startup
from mindvl_jax.training.hooks import Hooks
from mindvl_jax.training.trainer import TrainingDiverged
from mindvl_jax.weights import open_model
from tests.training.conftest import write_data

ROOT = Path(__file__).parents[2]
PHASES = ({"train": ["projector/**"], "steps": 3}, {"steps": 7, "gradient_accumulation": 2, "schedule": "cosine"})
ALL = {"steps": 7, "gradient_accumulation": 2}  # programs of the second phase again


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report has its own tests."""
    monkeypatch.setattr("mindvl_jax.cli.run_hooks.write_report", lambda run_dir: Path(run_dir) / "report.html")


@pytest.fixture
def say():
    """A console that keeps what is said."""
    return Console(record=True, width=200, file=open(os.devnull, "w"))


def bits(params):
    return {path: np.asarray(value).tobytes() for path, value in params.items()}


@pytest.fixture(scope="module")
def whole_run(assets, tmp_path_factory):
    """Configuration as plain data of a run that nothing interrupted, kept with a checkpoint of every step."""
    holder = {}

    def get(run_mapping):
        if not holder:
            holder["mapping"] = run_mapping(*PHASES, name="x", checkpoint={"every_steps": 1, "keep": 99})
            holder["mapping"]["run"]["dir"] = str(tmp_path_factory.mktemp("whole") / "run")
            train(config_loader.from_mapping(holder["mapping"]))
        return config_loader.from_mapping(holder["mapping"])

    return get


@pytest.fixture
def whole(whole_run, run_mapping, no_report):
    return whole_run(run_mapping)


def copy_of(config, folder):
    """The same run in another folder."""
    shutil.copytree(config.run.dir, folder)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def cut_to(config, step):
    """As if the run had been killed right after `step` was saved."""
    for child in Path(config.run.dir, "checkpoints").iterdir():
        if child.name.isdigit() and int(child.name) > step:
            shutil.rmtree(child)
    return config


def test_an_interrupted_run_ends_with_the_very_bits_of_an_uninterrupted_one(whole, tmp_path, run_mapping, read_metrics):
    mapping = run_mapping(*PHASES)
    config = config_loader.from_mapping(mapping)
    # Inside phase 0, at the border of the phases, inside phase 1.
    stops = [train(config, stop_after=stop) for stop in (2, 3, 5)]
    assert [(r.step, r.finished, r.stopped_by) for r in stops] == [
        (2, False, "stop_after"),
        (3, False, "stop_after"),
        (5, False, "stop_after"),
    ]
    assert train(config).finished
    compared = (
        "step",
        "phase",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "samples",
        "tokens_total",
        "samples_total",
        "epochs",
    )
    pieces, once = ([[line[key] for key in compared] for line in read_metrics(c)] for c in (config, whole))
    assert pieces == once
    assert bits(checkpoint.load_params(config.run.dir)[1]) == bits(checkpoint.load_params(whole.run.dir)[1])


def test_a_run_killed_between_checkpoints_walks_the_lost_steps_again_and_its_metrics_hold_each_step_once(
    whole, tmp_path, read_metrics
):
    config = cut_to(copy_of(whole, tmp_path / "killed"), 4)
    with open(tmp_path / "killed" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "loss": 1.')  # a line that the kill cut in two
    train(config)
    killed, once = ([(line["step"], line["loss"]) for line in read_metrics(c)] for c in (config, whole))
    assert killed == once and [step for step, _ in killed] == list(range(1, 11))
    assert bits(checkpoint.load_params(config.run.dir)[1]) == bits(checkpoint.load_params(whole.run.dir)[1])


def spread_over_eight(config):
    return config.model_copy(update={"mesh": config.mesh.model_copy(update={"data": 2, "fsdp": 2, "tensor": 2})})


def test_eight_devices_give_the_losses_of_one(whole, run_config, read_metrics):
    config = spread_over_eight(run_config(*PHASES, name="eight"))
    train(config)
    eight, one = ([line["loss"] for line in read_metrics(c)] for c in (config, whole))
    assert len(eight) == 10
    # float32, other orders of summation.
    worst = max(abs(a - b) / abs(b) for a, b in zip(eight, one, strict=True))
    assert worst < 1e-5, f"largest relative difference of the loss {worst:.2e}"


def spread_over_context(config):
    """Places, parameters and, over the copies, the optimizer; attention by rings."""
    return config.model_copy(
        update={
            "mesh": config.mesh.model_copy(update={"data": 2, "fsdp": 2, "context": 2}),
            "parallel": config.parallel.model_copy(update={"context_attention": "ring"}),
            "training": config.training.model_copy(
                update={"optimizer": config.training.optimizer.model_copy(update={"shard_over_data": True})}
            ),
        }
    )


def spread_over_stages(config):
    return config.model_copy(
        update={
            "mesh": config.mesh.model_copy(update={"stage": 2, "fsdp": 2}),
            "parallel": config.parallel.model_copy(update={"pipeline_schedule": "zero_bubble"}),
        }
    )


@pytest.mark.parametrize("spread", [spread_over_eight, spread_over_context, spread_over_stages])
def test_a_run_saved_on_one_device_goes_on_over_eight_and_back(whole, tmp_path, read_metrics, spread):
    config = cut_to(copy_of(whole, tmp_path / "spread"), 5)
    train(spread(config), stop_after=8)
    train(config)
    found, once = ([line["loss"] for line in read_metrics(c)] for c in (config, whole))
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, once, strict=True))
    assert worst < 1e-5, f"largest relative difference of the loss {worst:.2e}"


def damage(folder, kind):
    if kind == "missing":
        shutil.rmtree(folder / "params")
    elif kind == "truncated":
        for file in (folder / "optimizer").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "other values":
        file = next(
            file for file in (folder / "progress").iterdir() if '"fingerprints"' in file.read_text(errors="replace")
        )
        record = json.loads(file.read_text())
        path = next(iter(record["fingerprints"]))
        record["fingerprints"][path] ^= 1
        file.write_text(json.dumps(record))


@pytest.mark.parametrize("kind", ["missing", "truncated", "other values"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_taken(whole, tmp_path, say, kind):
    config = cut_to(copy_of(whole, tmp_path / "damaged"), 2)
    damage(tmp_path / "damaged" / "checkpoints" / "2", kind)
    assert train(config, stop_after=3, console=say).step == 3
    text = say.export_text()
    assert (
        "damaged checkpoint passed over" in text
        and "continuing" in text
        and "checkpoints/1: phase phase0, step 1" in text
    )
    assert (tmp_path / "damaged" / "damaged" / "2").is_dir()
    assert checkpoint.load_params(config.run.dir)[0] == config


def test_a_folder_whose_checkpoints_are_all_damaged_is_refused_with_each_reason(whole, tmp_path):
    config = cut_to(copy_of(whole, tmp_path / "lost"), 2)
    for step in ("1", "2"):
        damage(tmp_path / "lost" / "checkpoints" / step, "missing")
    with pytest.raises(UserError, match=r"(?s)no checkpoint can be read whole.*checkpoints/2.*checkpoints/1"):
        train(config)


def test_never_refuses_a_folder_that_holds_a_run(whole):
    with pytest.raises(UserError, match="run.resume=never, but run.dir=.* already holds a run"):
        train(whole.model_copy(update={"run": whole.run.model_copy(update={"resume": "never"})}))


def test_a_checkpoint_given_by_path_is_continued_in_a_new_folder(whole, tmp_path, read_metrics):
    source = Path(whole.run.dir) / "checkpoints" / "9"
    config = whole.model_copy(
        update={"run": whole.run.model_copy(update={"dir": str(tmp_path / "new"), "resume": str(source)})}
    )
    train(config)
    assert [(line["step"], line["loss"]) for line in read_metrics(config)] == [(10, read_metrics(whole)[-1]["loss"])]
    with pytest.raises(UserError, match="expected a run folder or one checkpoint"):
        train(config.model_copy(update={"run": config.run.model_copy(update={"resume": str(tmp_path / "nowhere")})}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"text": {"intermediate_size": 32}}},
            "holds another model than the configuration:\n  model.text.intermediate_size: 64 -> 32",
        ),
        (
            {"training": {"phases": [{"name": "other"}, {}]}},
            "is in phase 'phase1', which is 'late' in the configuration",
        ),
        ({"training": {"phases": [{}, {"train": ["language/**"]}]}}, "selects other parts than"),
        ({"training": {"phases": [{}, {"steps": 2}]}}, "steps=2, but .*checkpoints/6 has done 3 steps of it already"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_with_what_differs(whole, tmp_path, change, message):
    config = cut_to(copy_of(whole, tmp_path / "changed"), 6)
    mapping = config.model_dump()
    for section, values in change.items():
        if section == "training":
            mapping[section]["phases"] = [
                phase | new for phase, new in zip(mapping[section]["phases"], values["phases"], strict=True)
            ]
            if "name" in values["phases"][0]:
                mapping[section]["phases"][1]["name"] = "late"
        else:
            mapping[section]["text"] |= values["text"]
    with pytest.raises(UserError, match=message):
        train(config_loader.from_mapping(mapping))


def test_what_changed_since_the_checkpoint_is_said(whole, tmp_path, say):
    config = cut_to(copy_of(whole, tmp_path / "warmer"), 9)
    mapping = config.model_dump()
    mapping["training"]["phases"][1]["learning_rate"] = 0.01
    mapping["logging"]["every_steps"] = 5
    train(config_loader.from_mapping(mapping), console=say)
    text = say.export_text()
    assert (
        "changed since that checkpoint: training.phases[1].learning_rate: 0.003 -> 0.01" in text
        and "every_steps" not in text
    )


def test_only_the_newest_checkpoints_are_kept_and_a_finished_run_is_left_alone(assets, run_config, monkeypatch, say):
    calls = []
    monkeypatch.setattr(
        "mindvl_jax.cli.run_hooks.evaluate_run",
        lambda config, model, step, phase, run_dir, console: calls.append((phase, step, type(model).__name__)),
    )
    task = {"name": "t", "source": {"path": str(assets / "squares.parquet")}}
    config = run_config(
        *PHASES, checkpoint={"every_steps": 1, "keep": 2}, evaluation={"tasks": [task], "after_phases": True}
    )
    train(config)
    assert sorted(int(p.name) for p in Path(config.run.dir, "checkpoints").iterdir() if p.name.isdigit()) == [9, 10]
    assert calls == [("phase0", 3, "MindVL"), ("phase1", 10, "MindVL")]
    Path(config.run.dir, "report.html").write_text("")
    assert (
        train(config, console=say).finished
        and "finished already, after 10 steps" in say.export_text()
        and len(calls) == 2
    )
    assert config_loader.load(Path(config.run.dir, "config.yaml")) == config


def test_the_start_says_device_dtype_mesh_parts_and_shapes(whole, tmp_path, say):
    train(cut_to(copy_of(whole, tmp_path / "said"), 9), console=say)
    text = say.export_text()
    for expected in (
        "cpu",
        "data 1 x fsdp 1 x tensor 1",
        "float32",
        "no MFU",
        "npu_bridge.ops",
        "projector",
        "frozen",
        "trained",
        "4x96",
        "4x64x1176",
    ):
        assert expected in text, f"{expected!r} is missing in:\n{text}"


def test_without_a_mesh_a_run_takes_all_devices_and_says_why(run_config, say):
    config = run_config({"rows": 8}, mesh={"data": None})
    outline = outline_of(config.model)
    mesh, why = chosen_mesh(config, outline)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"data": len(jax.devices())}
    assert chosen_mesh(run_config(), outline)[0].size == 1
    print_startup(say, config, outline, mesh, None, "cpu", why)
    assert re.search(r"data 8 x fsdp 1 x tensor 1 \(8 of 8.*chosen: .* fit on each device", say.export_text())


def test_each_scored_phase_writes_the_report_and_says_where(run_config, say):
    class Recording(Hooks):
        written = 0

        def report(self, run_dir):
            self.written += 1
            return run_dir / "report.html"

    hooks = Recording()
    config = run_config({"steps": 1}, {"steps": 1}, evaluation={"after_phases": True})
    trainer.train(config, console=say, hooks=hooks)
    said = "".join(say.export_text().split("\n"))
    assert hooks.written == 2 and f"scores, answers and curves after phase0: {config.run.dir}/report.html" in said
    assert f"done: 2 steps, {config.run.dir}/report.html" in said


def test_a_second_process_is_kept_out_of_a_folder_in_use(run_config):
    import fcntl

    config = run_config()
    Path(config.run.dir).mkdir()
    with open(Path(config.run.dir, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains in this folder"):
            train(config)


def test_a_run_that_stays_non_finite_stops_and_names_the_samples(run_config, read_metrics):
    config = run_config({"steps": 9, "train": ["projector/**"]}, training={"max_bad_steps": 3})
    phases = [config.training.phases[0].model_copy(update={"learning_rate": 1e38})]  # the second step overflows
    config = config.model_copy(update={"training": config.training.model_copy(update={"phases": tuple(phases)})})
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .*Samples: squares-\d+, squares-\d+"):
        train(config)
    bad = [line for line in read_metrics(config) if not line["applied"]]
    assert [line["skipped_steps"] for line in bad] == [1, 2, 3]
    assert all(line["loss"] is None and line["sample_ids"] for line in bad)


def test_a_handful_of_samples_is_learnt_by_heart(run_config, read_metrics):
    config = run_config(
        ALL | {"steps": 120, "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 5},
        data={"sources": {"squares": {"max_samples": 8}}},
    )
    train(config)
    losses = [line["loss"] for line in read_metrics(config)]
    assert losses[0] > 5.0 and losses[-1] < 0.05, f"loss {losses[0]:.3f} at first, {losses[-1]:.4f} in the end"


# --- other processes -------------------------------------------------------------------------------------------------


def start(config_file, *overrides, devices=8):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    # train.py itself, and a last line that tells which modules it loaded.
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', '--config', {str(config_file)!r}, '--set', 'run.seed=3', *{list(overrides)!r}]\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "finally:\n    print('torch loaded:', 'torch' in sys.modules)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_metrics_hold_the_loss_of_each_source(assets, run_config, read_metrics):
    write_data(assets, count=24, seed=1, source="others")
    config = run_config(
        {"mixture": [{"source": "squares"}, {"source": "others", "weight": 2}]},
        data={"sources": {"others": {"path": str(assets / "others.parquet")}}},
    )
    with contextlib.closing(make_loader(config, 0)) as loader:
        packed = next(loader)
    for sources, segments, ids in zip(
        packed.batch.source_ids, packed.batch.segment_ids, packed.sample_ids, strict=True
    ):
        expected = [-1] + [["squares", "others"].index(name.split("-")[0]) for name in ids]
        assert (sources == np.array(expected)[segments]).all()
    train(config)
    for line in read_metrics(config):
        low, high = sorted([line["loss/squares"], line["loss/others"]])
        assert low <= line["loss"] <= high and low < high


def test_every_missing_file_is_named_before_the_first_step(assets, run_config):
    late = {"path": str(assets / "no-such.parquet")}
    config = run_config(
        {},
        {"mixture": [{"source": "late"}]},
        data={"sources": {"late": late}},
        evaluation={
            "tasks": [{"name": "held", "source": {"path": "gone.jsonl"}}],
            "benchmarks": {"folder": str(assets), "tasks": ["mme"]},
        },
    )
    with pytest.raises(UserError) as refused:
        train(config)
    first, second, third = str(refused.value).splitlines()
    assert third.startswith("evaluation.benchmarks: mme: no file of MME in")
    assert first.startswith("data.sources.late: nothing to read at") and second.startswith(
        "evaluation.tasks[0].source: nothing to read at 'gone.jsonl'"
    )
    assert not Path(config.run.dir, "metrics.jsonl").exists()


def test_a_run_begins_with_the_weights_of_another(whole, run_config, say):
    # A rate of zero leaves the parameters what they were at the start.
    config = run_config({"learning_rate": 0.0, "steps": 1}, name="heir", run={"init_from": whole.run.dir})
    train(config, console=say)
    assert f"starting from the weights of {whole.run.dir}" in say.export_text()
    assert bits(checkpoint.load_params(config.run.dir)[1]) == bits(checkpoint.load_params(whole.run.dir)[1])


def test_weights_of_another_model_are_refused_with_what_differs(whole, run_config):
    config = run_config({}, name="other", run={"init_from": whole.run.dir}, model={"text": {"intermediate_size": 48}})
    with pytest.raises(
        UserError, match=r"(?s)run.init_from=.* does not fit .*language/.*shape \(2, 32, 64\) there, \(2, 32, 48\)"
    ):
        train(config)


def test_sigterm_saves_and_exits_with_zero_and_nothing_loads_torch(run_mapping, tmp_path):
    mapping = run_mapping(ALL | {"steps": 100000}, logging={"tensorboard": True})
    file = tmp_path / "config.yaml"
    file.write_text(config_loader.dump(config_loader.from_mapping(mapping)))
    process = start(file)
    metrics = Path(mapping["run"]["dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while (
        time.monotonic() < deadline
        and not (metrics.exists() and metrics.read_text().count("\n") >= 3)
        and process.poll() is None
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped by SIGTERM after step {last} of 100000" in output and "torch loaded: False" in output
    assert (Path(mapping["run"]["dir"]) / "checkpoints" / str(last)).is_dir()


def test_a_bad_configuration_ends_with_one_message_and_exit_code_two(run_mapping, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config_loader.dump(config_loader.from_mapping(run_mapping())))
    process = start(file, "mesh.data=16")
    output, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and "mindvl train: mesh data 16 x fsdp 1 x tensor 1 needs 16 devices" in output
        and "Traceback" not in output
    ), output


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_losses_and_scores_of_one_and_one_process_opens_what_they_saved(
    whole, run_mapping, assets, tmp_path, read_metrics
):
    task = {
        "name": "squares",
        "source": {"path": str(assets / "squares.parquet")},
        "max_samples": 8,
        "max_new_tokens": 4,
    }
    config = config_loader.from_mapping(run_mapping(PHASES[0], name="pair", evaluation={"tasks": [task]}))
    file = tmp_path / "config.yaml"
    file.write_text(config_loader.dump(config))
    join = f"distributed.coordinator=localhost:{free_port()}", "distributed.processes=2", "mesh.fsdp=2"
    processes = [start(file, *join, f"distributed.process_id={index}", devices=1) for index in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    pair, one = [line["loss"] for line in read_metrics(config)], [line["loss"] for line in read_metrics(whole)][:3]
    worst = max(abs(a - b) / abs(b) for a, b in zip(pair, one, strict=True))
    assert worst < 1e-5, f"largest relative difference of the loss {worst:.2e}"
    theirs, ours = (
        checkpoint.load_params(config.run.dir)[1],
        checkpoint.load_params(Path(whole.run.dir, "checkpoints", "3"))[1],
    )
    # Adam divides by the gradient's size: differences of summation order reach a small part of the three steps' 0.009.
    worst = max(float(np.abs(np.asarray(theirs[path]) - np.asarray(ours[path])).max()) for path in ours)
    assert worst < 1e-4, f"largest difference of a parameter {worst:.2e}"
    # The same weights scored here, by one process.
    evaluate_run(config, open_model(config.run.dir).model, 3, "phase0", tmp_path / "alone")
    rows = [
        Path(folder, "predictions/phase0/squares.jsonl").read_text() for folder in (config.run.dir, tmp_path / "alone")
    ]
    assert rows[0] == rows[1] and rows[0].count("\n") == 8
