"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab and CSV.

Each gets the same numbers under the same names. A tracker that is not installed is refused before anything is trained.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_jsonl

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab"}
CSV = "metrics.csv"


class Tracker(Protocol):
    """A place that numbers go to."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def require_installed(config: Config) -> None:
    """Refuse trackers whose package is missing.

    Raises:
      UserError: names the packages and how to install them.
    """
    missing = [
        PACKAGES[name]
        for name in config.logging.to
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
    ]
    if missing:
        raise UserError(
            f"logging.to needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed here: pip install {' '.join(missing)}"
        )


def make_trackers(config: Config, first_step: int) -> list[Tracker]:
    """Return the trackers of `logging`. `first_step`: the run goes on after it."""
    run_dir, made = Path(config.run.dir), []
    if config.logging.tensorboard:
        made.append(TensorBoard(run_dir, first_step))
    plain = config.model_dump(mode="json")
    if "wandb" in config.logging.to:
        made.append(WandB(run_dir, config.logging.project, plain))
    if "mlflow" in config.logging.to:
        made.append(MLflow(run_dir, config.logging.project, plain))
    if "swanlab" in config.logging.to:
        made.append(SwanLab(run_dir, config.logging.project, plain))
    if "csv" in config.logging.to:
        made.append(Csv(run_dir))
    return made


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record, without its step."""
    return {
        key: value for key, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and key != "step"
    }  # fmt: skip


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int):
        # purge_step hides what an earlier process logged beyond the restored step.
        self._writer = _summary_writer_class()(
            str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None, flush_secs=30
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


def _summary_writer_class() -> type:
    """tensorboardX's writer.

    It imports torch where it finds it, to accept torch tensors; here are none, and torch takes seconds.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # an import of it now fails, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class WandB:
    """A run of Weights & Biases. Its id is kept in the run folder, so that a run that goes on continues it."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]):
        wandb = importlib.import_module("wandb")
        kept = run_dir / "wandb_id.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=config, id=known, resume="allow"
        )
        kept.write_text(str(self._run.id) + "\n", encoding="utf-8")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, under MLFLOW_TRACKING_URI; metric names may not hold every sign."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]):
        self._mlflow = importlib.import_module("mlflow")
        kept = run_dir / "mlflow_id.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        self._mlflow.set_experiment(project)
        run = self._mlflow.start_run(run_id=known) if known else self._mlflow.start_run(run_name=run_dir.name)
        if known is None:
            self._mlflow.log_dict(config, "config.json")
        kept.write_text(str(run.info.run_id) + "\n", encoding="utf-8")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class SwanLab:
    """A run of SwanLab."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]):
        self._swanlab = importlib.import_module("swanlab")
        self._swanlab.init(
            project=project, experiment_name=run_dir.name, logdir=str(run_dir / "swanlab"), config=config
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(numbers), step=step)

    def close(self) -> None:
        self._swanlab.finish()


class Csv:
    """RUN/metrics.csv, written from metrics.jsonl when the process ends: columns of later phases are known then."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        rows = read_jsonl(self._run_dir / "metrics.jsonl")
        with open(self._run_dir / CSV, "w", encoding="utf-8", newline="") as file:
            write_csv(rows, file)


def write_csv(rows: Iterable[Mapping[str, Any]], file: Any) -> None:
    """Write records as CSV, with a column for every name that any of them has; lists become JSON."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in rows:
        writer.writerow(
            [
                ""
                if (value := row.get(name)) is None
                else json.dumps(value)
                if isinstance(value, (list, dict))
                else value
                for name in columns
            ]
        )


def scores_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return scores.json as numbers: score/TASK, and score/TASK/without_images where that was measured."""
    numbers: dict[str, float] = {}
    tasks = [(name, task["exact_match"], task) for name, task in scores.get("tasks", {}).items()]
    tasks += [(name, task["score"], task) for name, task in (scores.get("benchmarks") or {}).get("tasks", {}).items()]
    for name, score, task in tasks:
        numbers[f"score/{name}"] = score
        if task.get("language_only") is not None:
            numbers[f"score/{name}/without_images"] = task["language_only"]
    return numbers
