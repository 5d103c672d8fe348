"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab and CSV.

Each gets the same numbers under the same names, and the answers of each evaluation that the report shows, with their
images where the tracker takes images. A tracker that is not installed is refused before anything is trained.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError, printable
from mindvl_jax.core.files import read_jsonl

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab"}
CSV, SCORES_CSV, ANSWERS_CSV = "metrics.csv", "scores.csv", "answers.csv"
SCORE = "score/"  # begins the names of scores
ANSWER_COLUMNS = ("task", "question", "prediction", "expected", "score")
IMAGES = 4  # of a task that TensorBoard shows


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer of an evaluation, as a tracker shows it. `picture`: the sample's first image, if it has one."""

    task: str
    question: str
    prediction: str
    expected: str
    score: float
    picture: Path | None = None

    def line(self) -> str:
        """Return the sample in one line, such as under its image."""
        return f"{self.question} -> {self.prediction} (expected {self.expected})"

    def cells(self) -> dict[str, str | float]:
        """Return what is text or number."""
        return {
            "task": self.task,
            "question": self.question,
            "prediction": self.prediction,
            "expected": self.expected,
            "score": self.score,
        }


class Tracker(Protocol):
    """A place that numbers and answers go to."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def show(self, answers: Sequence[ShownAnswer], step: int) -> None: ...
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
        made.append(Csv(run_dir, first_step))
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

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        for task in dict.fromkeys(answer.task for answer in answers):
            own = [answer for answer in answers if answer.task == task]
            self._writer.add_text(f"answers/{task}", markdown(own), step)
            for number, answer in enumerate(own[:IMAGES]):
                if answer.picture is not None:
                    pixels = np.asarray(Image.open(answer.picture).convert("RGB"))
                    self._writer.add_image(f"answers/{task}/{number}", pixels, step, dataformats="HWC")

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

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        wandb = importlib.import_module("wandb")
        table = wandb.Table(columns=["image", *ANSWER_COLUMNS])
        images: dict[str, list[Any]] = {}
        for answer in answers:
            image = None if answer.picture is None else wandb.Image(str(answer.picture), caption=answer.line())
            table.add_data(image, *answer.cells().values())
            if image is not None:
                images.setdefault(f"images/{answer.task}", []).append(image)
        self._run.log({"answers": table, **images}, step=step)

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
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in numbers.items()}, step=step)

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        rows = [answer.cells() for answer in answers]
        self._mlflow.log_dict({"step": step, "answers": rows}, f"answers/step-{step:06d}.json")
        for number, answer in enumerate(answers):
            if answer.picture is not None:
                folder = f"answers/step-{step:06d}/{number:03d}-{_mlflow_name(answer.task)}"
                self._mlflow.log_artifact(str(answer.picture), folder)

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

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        swanlab = self._swanlab
        for task in dict.fromkeys(answer.task for answer in answers):
            own = [answer for answer in answers if answer.task == task]
            shown: dict[str, Any] = {f"answers/{task}": [swanlab.Text(answer.line()) for answer in own]}
            pictures = [
                swanlab.Image(str(answer.picture), caption=answer.line())
                for answer in own
                if answer.picture is not None
            ]
            if pictures:
                shown[f"images/{task}"] = pictures
            swanlab.log(shown, step=step)

    def close(self) -> None:
        self._swanlab.finish()


class Csv:
    """RUN/metrics.csv, scores.csv and answers.csv.

    The first is written from metrics.jsonl when the process ends: columns of later phases are known then.
    """

    def __init__(self, run_dir: Path, first_step: int):
        self._run_dir = run_dir
        for name in (SCORES_CSV, ANSWERS_CSV):
            _cut_csv(run_dir / name, first_step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        scores = [(name, value) for name, value in numbers.items() if name.startswith(SCORE)]
        self._append(SCORES_CSV, ["step", "score", "value"], [[step, name, value] for name, value in scores])

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        rows = [[step, *answer.cells().values(), answer.picture or ""] for answer in answers]
        self._append(ANSWERS_CSV, ["step", *ANSWER_COLUMNS, "image"], rows)

    def _append(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not rows:
            return
        new = not (self._run_dir / name).is_file()
        with open(self._run_dir / name, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows] if new else rows)

    def close(self) -> None:
        rows = read_jsonl(self._run_dir / "metrics.jsonl", whole=False)
        with open(self._run_dir / CSV, "w", encoding="utf-8", newline="") as file:
            write_csv(rows, file)


def _cut_csv(path: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`: a run that goes on writes them again."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= last_step]
    if len(kept) < len(rows):
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *kept])


def markdown(answers: Sequence[ShownAnswer]) -> str:
    """Return a table of answers for a page that renders Markdown. Cells are other people's text: signs are escaped."""
    lines = [f"| {' | '.join(ANSWER_COLUMNS)} |", "|" + "---|" * len(ANSWER_COLUMNS)]
    for answer in answers:
        cells = (re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", str(cell)) for cell in answer.cells().values())
        lines.append(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |")
    return "\n".join(lines)


def _mlflow_name(name: str) -> str:
    """Return a name that MLflow takes: it refuses most signs, and its folders cannot hold `loss` beside `loss/a`."""
    return re.sub(r"[^\w\-. ]", "_", name.replace("/", "."))


def answers_of(run_dir: Path, phase: str, tasks: Iterable[str]) -> list[ShownAnswer]:
    """Return the answers of an evaluation that were kept with their images, wrong ones first in each task."""
    folder, shown = run_dir / "predictions" / phase, []
    for task in tasks:
        rows = [row for row in read_jsonl(folder / f"{task}.jsonl", whole=False) if "shown" in row]
        for row in sorted(rows, key=lambda row: row["score"]):
            pictures = [folder / name for name in row["shown"]]
            expected = " / ".join(map(str, row["answers"]))
            shown.append(
                ShownAnswer(
                    task, row["question"], row["prediction"], expected, row["score"], next(iter(pictures), None)
                )
            )
    return shown


def write_csv(rows: Iterable[Mapping[str, Any]], file: Any) -> None:
    """Write records as CSV, with a column for every name that any of them has; lists become JSON."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(file)
    writer.writerow(map(_cell, columns))
    for row in rows:
        writer.writerow(
            [
                ""
                if (value := row.get(name)) is None
                else json.dumps(value)
                if isinstance(value, (list, dict))
                else _cell(value)
                for name in columns
            ]
        )


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet shows and does not run: text that begins like a formula gets a quote before it."""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value)


def scores_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return scores.json as numbers: score/TASK, and score/TASK/without_images where that was measured."""
    numbers: dict[str, float] = {}
    tasks = [*scores.get("tasks", {}).items(), *(scores.get("benchmarks") or {}).get("tasks", {}).items()]
    for name, task in tasks:
        numbers[f"{SCORE}{name}"] = task["score"]
        if task.get("language_only") is not None:
            numbers[f"{SCORE}{name}/without_images"] = task["language_only"]
    return numbers
