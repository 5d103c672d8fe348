"""metrics.jsonl, TensorBoard, FLOPs and the live line."""

import json
import math
import sys
import types

import pytest
from rich.console import Console

from mindvl_jax.core.devices import known_peak
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import matches
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.flops import FlopCounter
from mindvl_jax.training.display import LiveLine, duration, human
from mindvl_jax.training.loggers import TensorBoard, make_trackers, require_installed, scores_of
from mindvl_jax.training.metrics import FILE, MetricsLog, cut_metrics

D, F, N, K, H, V, L = 32, 48, 4, 2, 8, 64, 3  # language
DV, FV, P, DEPTH = 16, 24, 3 * 2 * 14 * 14, 5  # vision, two blocks of five attend to the whole image


@pytest.fixture(scope="module")
def model():
    return MindVLConfig.model_validate(
        {
            "vision": {
                "depth": DEPTH,
                "hidden_size": DV,
                "intermediate_size": FV,
                "num_heads": 2,
                "fullatt_block_indexes": [1, 4],
            },
            "text": {
                "family": "qwen3",
                "vocab_size": V,
                "hidden_size": D,
                "intermediate_size": F,
                "num_layers": L,
                "num_heads": N,
                "num_kv_heads": K,
                "head_dim": H,
                "tie_word_embeddings": True,
                "rope": "1d",
            },
            "image_token_id": 1,
            "video_token_id": 2,
            "vision_start_token_id": 3,
            "vision_end_token_id": 4,
        }
    )


@pytest.mark.parametrize(
    ("globs", "vision_factor", "vision_attention", "projector_factor", "language_factor", "head_factor"),
    [
        (("**",), 3, 3, 3, 3, 3),
        (("projector/**",), 1, 1, 3, 2, 2),  # the decoder only passes gradients on
        (("language/**",), 1, 1, 1, 3, 3),
    ],
)
def test_flops_are_those_of_the_products_that_each_phase_needs(
    model, globs, vision_factor, vision_attention, projector_factor, language_factor, head_factor
):
    shapes = outline_of(model).shapes
    trained = [path for path in shapes if any(matches(path, glob) for glob in globs)]
    counts = {
        "tokens": 100,
        "label_tokens": 30,
        "samples": 4,
        "patches": 64,
        "segment_squares": 3000,
        "image_squares": 1500,
        "window_squares": 700,
    }
    got = FlopCounter(model, shapes, trained)(counts)

    layer = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
    language = 2 * 100 * L * layer * language_factor + 2 * 30 * D * V * head_factor + 3 * L * (2 * 2 * N * H * 3000) / 2
    block = 4 * DV * DV + 3 * DV * FV
    vision = 2 * 64 * (P * DV + DEPTH * block) * vision_factor + vision_attention * 2 * 2 * DV * (2 * 1500 + 3 * 700)
    vision += 2 * 16 * (4 * DV * 4 * DV + 4 * DV * D) * projector_factor
    assert math.isclose(got.language, language, rel_tol=1e-12), (
        f"{got.language} against {language}, difference {got.language - language}"
    )
    assert math.isclose(got.vision, vision, rel_tol=1e-12), (
        f"{got.vision} against {vision}, difference {got.vision - vision}"
    )


def test_an_unknown_device_has_no_peak_and_the_longest_name_wins():
    assert known_peak("cpu") is None
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12 and known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("TPU v5 lite") == 197e12 and known_peak("TPU v5p") == 459e12


def test_metrics_beyond_the_restored_step_are_cut_with_a_torn_last_line(tmp_path):
    file = tmp_path / FILE
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert cut_metrics(file, 2) == 2
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    assert cut_metrics(file, 2) == 0 and cut_metrics(tmp_path / "none", 2) == 0


def test_numbers_go_to_json_and_tensorboard_and_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path, trackers=[TensorBoard(tmp_path, 0)], first_step=0)
    log.write({"step": 1, "phase": "a", "loss": 2.5, "applied": True})
    log.write({"step": 2, "phase": "a", "loss": math.nan, "applied": False})
    log.close()
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (tmp_path / FILE).read_text().splitlines()
    ]
    assert [line["loss"] for line in lines] == [2.5, None]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events and b"applied" not in events


def record(step, **changes):
    base = {
        "step": step,
        "phase": "sft",
        "loss": 1.25,
        "tokens": 4000,
        "samples": 60,
        "step_seconds": 0.5,
        "token_efficiency": 0.93,
        "mfu": None,
    }
    return base | changes


def test_the_line_tells_rates_without_the_compiling_step_and_the_time_left():
    line = LiveLine(Console(quiet=True), 21)
    line.update(record(1, step_seconds=60.0), first_of_phase=True)
    for step in range(2, 12):
        line.update(record(step), first_of_phase=False)
    text = line.text(record(11, mfu=None))
    assert text == "sft 11/21 | loss 1.2500 | 8k tok/s | 120 samples/s | packed 93% | ETA 0:05"


def test_the_line_shows_mfu_and_trouble_only_where_there_is_some():
    line = LiveLine(Console(quiet=True), 10)
    text = line.text(record(5, mfu=0.412, mfu_language=0.398, skipped_steps=2, quarantined=7))
    assert "MFU 41.2% (39.8% without ViT)" in text and "skipped 2" in text and "quarantined 7" in text


def test_numbers_and_durations_are_short():
    assert [human(x) for x in (1234567, 989e12, 12, 0.5)] == ["1.23M", "989T", "12", "0.5"]
    assert [duration(x) for x in (5, 65, 3725, math.inf)] == ["0:05", "1:05", "1:02:05", "?"]


def test_trackers_get_the_numbers_and_a_resumed_run_continues_theirs(run_config, monkeypatch, tmp_path):
    calls = []

    def note(what):
        return lambda *given, **named: (
            calls.append((what, given, named))
            or types.SimpleNamespace(
                id="w1", info=types.SimpleNamespace(run_id="m1"), log=note("wandb.log"), finish=note("wandb.finish")
            )
        )

    for name, functions in (
        ("wandb", ("init",)),
        ("mlflow", ("set_experiment", "start_run", "log_dict", "log_metrics", "end_run")),
        ("swanlab", ("init", "log", "finish")),
    ):
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function, note(f"{name}.{function}"))
        monkeypatch.setitem(sys.modules, name, module)
    config = run_config(logging={"to": ["wandb", "mlflow", "swanlab", "csv"], "project": "p"})
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        log = MetricsLog(tmp_path / "run", trackers=make_trackers(config, step - 1), first_step=step - 1)
        log.write({"step": step, "phase": "a", "loss": 2.5, "applied": True, "grad_norm": math.nan})
        log.track(scores_of({"tasks": {"t": {"score": 0.5, "language_only": 0.1}}}), step)
        log.close()
    logged = [(what, given, named) for what, given, named in calls if what.endswith((".log", "log_metrics"))]
    assert next(entry for entry in logged if entry[0] == "mlflow.log_metrics") == (
        "mlflow.log_metrics",
        ({"loss": 2.5},),
        {"step": 1},
    )
    named = [{name.replace("/", "."): value for name, value in given[0].items()} for _, given, _ in logged]
    assert named.count({"score.t": 0.5, "score.t.without_images": 0.1}) == 6
    assert [named.get("id") for what, _, named in calls if what == "wandb.init"] == [None, "w1"]
    assert [named.get("run_id") for what, _, named in calls if what == "mlflow.start_run"] == [None, "m1"]
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines() == [
        "step,phase,loss,applied,grad_norm",
        "1,a,2.5,True,",
        "2,a,2.5,True,",
    ]


def test_a_tracker_that_is_not_installed_is_refused_by_name(run_config, monkeypatch):
    monkeypatch.setattr("mindvl_jax.training.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb swanlab"):
        require_installed(run_config(logging={"to": ["wandb", "csv", "swanlab"]}))
