"""`evaluation.ema`: what a run with a moving average writes down of itself."""

import importlib.util
import json
from pathlib import Path

import pytest

from mindvl_jax.cli import main as cli
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.files import read_jsonl
from mindvl_jax.evaluation.run import sample_items
from mindvl_jax.inference import Generator, Sampling
from mindvl_jax.weights import open_model

_spec = importlib.util.spec_from_file_location(
    "training_fixtures", Path(__file__).parents[1] / "training" / "conftest.py"
)
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose average lies between its random start and its end."""
    folder = tmp_path_factory.mktemp("ema")
    _training.write_tokenizer(folder)
    _training.write_data(folder)
    _training.write_data(folder, count=12, seed=1, source="held_out")
    task = {"name": "held_out", "source": {"path": str(folder / "held_out.parquet")}, "max_new_tokens": 4}
    config = config_loader.from_mapping(
        _training.configuration(
            folder,
            folder / "run",
            {"steps": 12, "learning_rate": 1e-2, "max_pixels": 784},
            training={"ema_decay": 0.9},
            evaluation={"tasks": [task], "ema": True, "language_only": False, "batch": 4},
        )
    )
    train(config)
    return config


def _answers(config, weights):
    task = config.evaluation.tasks[0]
    requests = [
        item.request(Sampling(max_new_tokens=task.max_new_tokens))
        for item in sample_items(task.name, task.source, None)
    ]
    return [answer.text for answer in Generator(open_model(weights), slots=config.evaluation.batch).generate(requests)]


def test_the_scores_of_the_run_are_those_of_its_average_and_not_of_its_newest_parameters(run):
    written = [row["prediction"] for row in read_jsonl(Path(run.run.dir) / "predictions" / "phase0" / "held_out.jsonl")]
    assert written == _answers(run, f"{run.run.dir}:ema")
    assert written != _answers(run, run.run.dir), (
        "the average answers as the parameters do: this run cannot tell them apart"
    )


def test_evaluating_the_average_by_name_gives_the_score_of_the_run(run):
    assert cli.main(["evaluate", "--weights", f"{run.run.dir}:ema", "--batch", "4", "--no-language-only"]) == 0
    again = json.loads((Path(run.run.dir) / "evaluation-ema" / "scores.json").read_text())["held_out"]
    during = json.loads((Path(run.run.dir) / "scores.json").read_text())["tasks"]["held_out"]
    assert (again["score"], again["n"]) == (during["score"], during["n"])
