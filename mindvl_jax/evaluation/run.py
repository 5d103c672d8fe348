"""Held-out scores of a training run: at the end, and at the end of each phase when the config asks for it.

Writes into the run folder:
  scores.json                         the table, newest evaluation on top, each phase's below
  predictions/PHASE/TASK.jsonl        every answer beside what was expected
  predictions/PHASE/TASK/NNN.png      images of the samples that the report shows
  predictions/PHASE/benchmarks/       the same of the benchmarks (`run_benchmarks.py`)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mindvl_jax.config.schema import Config, EvaluationTask, SourceConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, write_json, write_jsonl
from mindvl_jax.core.progress import counting
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.evaluation.images import keep_pictures
from mindvl_jax.evaluation.items import Item, item_from_sample
from mindvl_jax.evaluation.metrics import rule_of
from mindvl_jax.evaluation.run_benchmarks import Show, counted, evaluate_benchmarks
from mindvl_jax.evaluation.statistics import bootstrap_interval
from mindvl_jax.evaluation.tables import score_table
from mindvl_jax.inference import Generator, Sampling
from mindvl_jax.inference.prompts import without_media

log = logging.getLogger(__name__)
COMPILES = "programs that are new are compiled"


@dataclasses.dataclass(frozen=True)
class LiveModel:
    """A model in memory with what generation needs around it."""

    model: Any
    tokenizer: Any
    min_pixels: int
    max_pixels: int


def evaluate_run(
    config: Config, model, step: int, phase: str, run_dir: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Score the model on `config.evaluation.tasks`, after the last phase on `config.evaluation.benchmarks` too, updates
    scores.json and returns its content.

    Args:
      model: a live MindVL module. Its parameters may be spread over a mesh of any shape.
      step: optimizer steps so far. phase: name of the phase that just ended; after the last phase all samples are taken
        and the language-only score is measured beside, in between `phase_samples` of each task.
      console: told how far it is, and the scores at the end.

    Raises:
      UserError: a task's data cannot be read.
    """
    run_dir = Path(run_dir)
    console = console or Console(quiet=True)
    with counting(console, first=COMPILES) as show:
        scores = _evaluate(config, model, step, phase, run_dir, show)
    console.print(score_table(scores, f"held-out scores after {phase}, step {step}"))
    return scores


def _evaluate(config: Config, model, step: int, phase: str, run_dir: Path, show: Show) -> dict[str, Any]:
    settings = config.evaluation
    final = phase == config.training.phases[-1].name
    limits = config.training.phases[-1]
    generator = Generator(
        LiveModel(
            model,
            _tokenizer(config.tokenizer),
            settings.min_pixels or limits.min_pixels,
            settings.max_pixels or limits.max_pixels,
        ),
        slots=settings.batch,
        resample=config.data.resample,
        video_fps=config.data.video_fps,
        video_max_frames=config.data.video_max_frames,
    )
    scores = _earlier_scores(run_dir / "scores.json")

    def limit(task):
        return min(
            (value for value in (task.max_samples, None if final else settings.phase_samples) if value is not None),
            default=None,
        )

    # All samples are read before the first token is generated: one that cannot be used is said at once.
    prepared = {task.name: sample_items(task.name, task.source, limit(task)) for task in settings.tasks}
    for task in settings.tasks:
        started = time.perf_counter()
        items = prepared.pop(task.name)
        result, rows = score_items(
            generator,
            items,
            max_new_tokens=task.max_new_tokens,
            metric=task.metric,
            language_only=settings.language_only and final,
            on_progress=lambda done, total, what, name=task.name: show(done, total, name + what),
        )
        result |= {
            "step": step,
            "seconds": round(time.perf_counter() - started, 2),
            "blind_majority": _blind_majority(task),
        }
        by_phase = scores["tasks"].get(task.name, {}).get("by_phase", {})
        by_phase[phase] = {key: result[key] for key in ("score", "ci95", "n", "step")}
        scores["tasks"][task.name] = {**result, "by_phase": by_phase}
        if jax.process_index() == 0:
            keep_pictures(items, rows, run_dir / "predictions" / phase / task.name)
            write_jsonl(run_dir / "predictions" / phase / f"{task.name}.jsonl", rows)
    if settings.benchmarks is not None and final:
        scores["benchmarks"] = evaluate_benchmarks(
            generator,
            settings.benchmarks,
            run_dir / "predictions" / phase / "benchmarks",
            language_only=settings.language_only,
            on_progress=show,
        )
    scores |= {"step": step, "phase": phase}
    if jax.process_index() == 0:
        write_json(run_dir / "scores.json", scores)
    return scores


def _earlier_scores(path: Path) -> dict[str, Any]:
    """Scores of earlier phases. A damaged file is set aside: what is scored now must not be lost with it."""
    try:
        content = read_json(path, {"tasks": {}})
        if (
            isinstance(content, dict)
            and isinstance(content.get("tasks"), dict)
            and all(isinstance(task, dict) and "score" in task for task in content["tasks"].values())
        ):
            return content
        problem = "of another form"
    except ValueError as error:
        problem = str(error)
    path.replace(path.with_name(path.name + ".damaged"))
    log.warning("%s is damaged (%s); it was moved to %s.damaged, and scores begin anew", path, problem, path.name)
    return {"tasks": {}}


def score_items(
    generator: Generator,
    items: list[Item],
    *,
    max_new_tokens: int,
    language_only: bool,
    metric: str = "exact_match",
    on_progress: Show | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score greedy answers to items.

    Args:
      metric: see `metrics.rule_of`.
      language_only: also answer with the images taken away.
      on_progress: called with answers done, their number and "" or " without images".

    Returns:
      The task's scores, and one row an item for the predictions file.
    """
    if not items:
        raise UserError("no samples to score")
    main, rule = rule_of(metric)

    def points(item: Item, text: str) -> float:
        return rule(item, text)[main]

    sampling = Sampling(max_new_tokens=max_new_tokens)
    requests = [item.request(sampling) for item in items]
    answers = counted(generator, requests, on_progress, "")
    rows = [
        {
            "id": item.id,
            "question": item.question,
            "answers": list(item.answers),
            "prediction": answer.text,
            "score": points(item, answer.text),
        }
        | ({"error": answer.error} if answer.error else {})
        for item, answer in zip(items, answers, strict=True)
    ]
    result = {
        "metric": main,
        "score": _mean([row["score"] for row in rows]),
        "ci95": [round(bound, 4) for bound in bootstrap_interval([row["score"] for row in rows])],
        "n": len(rows),
        "errors": sum("error" in row for row in rows),
    }
    if language_only:
        blind = counted(generator, [without_media(request) for request in requests], on_progress, " without images")
        for row, item, answer in zip(rows, items, blind, strict=True):
            row |= {
                "language_only_prediction": answer.text,
                "language_only_score": points(item, answer.text),
            }
        result["language_only"] = _mean([row["language_only_score"] for row in rows])
    return result, rows


def _mean(scores: list[float]) -> float:
    return round(float(np.mean(scores)), 4)


@functools.lru_cache(maxsize=4)
def _tokenizer(config: TokenizerConfig):
    return load_tokenizer(config)


def sample_items(name: str, source: SourceConfig, most: int | None) -> list[Item]:
    """Samples in a training format as questions; at most `most`, then a fixed random part: files are often sorted by
    answer.

    Raises:
      UserError: files or samples that cannot be read.
    """
    opened = Source(name, source)
    chosen = range(len(opened))
    if most is not None and most < len(opened):
        chosen = sorted(np.random.default_rng(0).permutation(len(opened))[:most].tolist())
    try:
        items = [item_from_sample(opened[index]) for index in chosen]
    except UserError as error:
        raise UserError(f"evaluation task {name} ({source.path}): {error}") from error
    return [dataclasses.replace(item, id=f"{index}:{item.id}") for index, item in zip(chosen, items, strict=True)]


def _blind_majority(task: EvaluationTask) -> float | None:
    """Score of always giving each question's most frequent training answer, as the data set's manifest states it."""
    path = Path(task.source.path)
    for folder in path.parents[:2]:
        if (folder / "manifest.json").is_file():
            try:
                blind = read_json(folder / "manifest.json").get("blind", {})
            except (ValueError, AttributeError):  # some other data set's manifest
                return None
            return blind.get(path.stem)
    return None
