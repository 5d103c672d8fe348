"""Scoring a model on benchmarks: predictions are kept sample by sample, so a stopped evaluation goes on where it was.

A folder of results holds, for each task:
  TASK.jsonl         one line a finished sample: prediction, scores, language-only prediction
  TASK.json          scores with intervals, by category; settings
  index.html         scores of all tasks, and every prediction beside its image
The cache line of a sample is used again only under the same weights and settings (`fingerprint`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_jsonl, write_json
from mindvl_jax.evaluation.benchmarks import Benchmark
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.statistics import bootstrap_interval
from mindvl_jax.inference import Answer, Generator, Sampling
from mindvl_jax.inference.prompts import without_media


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Generation settings: everything besides sample and weights that changes a prediction.

    The image areas are those in force, never "the model's own": those may change.
    """

    max_new_tokens: int
    min_pixels: int
    max_pixels: int
    prompts: str = "published"

    def fingerprint(self, weights: str) -> str:
        return hashlib.sha256(json.dumps([weights, dataclasses.asdict(self)]).encode()).hexdigest()[:16]


_KEPT = {"id", "language_only", "prediction", "prompt_tokens"}


class Predictions:
    """Predictions of one task, appended to a JSONL file as they are made and found again by id.

    Args:
      fingerprint: of weights and settings; lines of another one are left alone and not used.
    """

    def __init__(self, path: Path, fingerprint: str):
        self._path, self._fingerprint = path, fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl(path, whole=False)
        if path.is_file() and not path.read_bytes().endswith(
            b"\n"
        ):  # a line cut off by a kill: what follows must not join it
            with open(path, "r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        self._known: dict[tuple[str, bool], dict] = {
            (row["id"], row["language_only"]): row
            for row in rows
            if row.get("fingerprint") == fingerprint and row.keys() >= _KEPT
        }
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def get(self, item: Item, language_only: bool) -> dict | None:
        return self._known.get((item.id, language_only))

    def add(self, item: Item, answer: Answer, language_only: bool) -> None:
        row = {
            "id": item.id,
            "language_only": language_only,
            "fingerprint": self._fingerprint,
            "prediction": answer.text,
            "tokens": len(answer.tokens),
            "logprob": round(float(sum(answer.logprobs)), 4),
            "prompt_tokens": answer.prompt_tokens,
        } | ({"error": answer.error} if answer.error else {})
        self._known[item.id, language_only] = row
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def predict(
    generator: Generator,
    items: Sequence[Item],
    settings: Settings,
    predictions: Predictions,
    *,
    language_only: bool,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """A prediction for each item, from the cache where it is there, by the model otherwise.

    Args:
      language_only: answer with the images taken away.
      on_progress: called with the number of samples finished so far.
    """
    missing = [item for item in items if predictions.get(item, language_only) is None]
    done = len(items) - len(missing)
    if on_progress:
        on_progress(done)

    def keep(index: int, answer: Answer) -> None:
        nonlocal done
        predictions.add(missing[index], answer, language_only)
        done += 1
        if on_progress:
            on_progress(done)

    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    step = 512  # encoded images' memory; every finished sample is on disk at once
    for start in range(0, len(missing), step):
        part = missing[start : start + step]
        requests = [_request(item, sampling, settings, language_only) for item in part]
        generator.generate(
            requests, skip_errors=True, on_answer=lambda index, answer, start=start: keep(start + index, answer)
        )
    return [predictions.get(item, language_only) for item in items]


def _request(item: Item, sampling: Sampling, settings: Settings, language_only: bool):
    if language_only:
        return without_media(item.request(sampling))
    return item.request(sampling, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)


def require_scorable(benchmark: Benchmark, items: Sequence[Item]) -> None:
    """Score every item with an answer that is never right, and sum up: a row that breaks scoring is found before the
    first token.

    Raises:
      UserError: no items, or one that the benchmark's rule cannot score; the message names it.
    """
    if not items:
        raise UserError(f"{benchmark.title}: no samples to score")
    for item in items:
        try:
            benchmark.score(item, "-")
        except Exception as error:  # rules read what the row holds, whatever that is
            raise UserError(
                f"{benchmark.title}: sample {item.id} cannot be scored ({type(error).__name__}: {error}); "
                "take the row out, or correct it"
            ) from None
    try:
        summarise(benchmark, items, [{"prediction": "-"}] * len(items), None)
    except Exception as error:
        raise UserError(
            f"{benchmark.title}: its {len(items)} samples cannot be summed up ({type(error).__name__}: {error})"
        ) from None


def summarise(
    benchmark: Benchmark, items: Sequence[Item], rows: Sequence[dict], blind: Sequence[dict] | None
) -> dict[str, Any]:
    """Scores of a task from its predictions.

    Returns:
      `score` (the main metric), `ci95`, means of every metric, of every category, and what the benchmark adds.
      Intervals resample groups (pairs, rotations of one question), since their members are not independent.
    """
    scores = [benchmark.score(item, row["prediction"]) for item, row in zip(items, rows, strict=True)]
    groups: dict[str, list[float]] = defaultdict(list)
    categories: dict[str, list[float]] = defaultdict(list)
    for item, score in zip(items, scores):
        groups[benchmark.group(item)].append(score[benchmark.metric])
        if item.category:
            categories[item.category].append(score[benchmark.metric])
    result: dict[str, Any] = {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "score": _mean(score[benchmark.metric] for score in scores),
        "ci95": [round(bound, 4) for bound in bootstrap_interval([float(np.mean(group)) for group in groups.values()])],
        "n": len(items),
        "errors": sum("error" in row for row in rows),
    }
    result |= {name: _mean(score[name] for score in scores) for name in scores[0]}
    if len(categories) > 1:
        result["by_category"] = {
            category: {"score": _mean(values), "n": len(values)} for category, values in sorted(categories.items())
        }
    if benchmark.summarise:
        result |= benchmark.summarise(items, scores)
    if blind is not None:
        without = [benchmark.score(item, row["prediction"]) for item, row in zip(items, blind, strict=True)]
        result["language_only"] = _mean(score[benchmark.metric] for score in without)
        if benchmark.summarise:
            result["language_only_summary"] = benchmark.summarise(items, without)
    return result


def _mean(values) -> float:
    return round(float(np.mean(list(values))), 4)


def weights_identity(folder: str | Path) -> str:
    """Tell one state of a folder of weights from another: names, sizes and times of the files that decide an answer,
    not their content.

    What evaluation itself writes into the folder does not count.
    """
    folder = Path(folder)
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        decides = (
            path.suffix == ".safetensors"
            or relative.parts[0] in ("checkpoints", "params")
            or str(relative) in ("config.json", "tokenizer.json", "adapter_config.json")
        )
        if decides and path.is_file():
            stat = os.stat(path)
            digest.update(f"{relative}:{stat.st_size}:{stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def evaluate_task(
    generator: Generator,
    name: str,
    benchmark: Benchmark,
    items: Sequence[Item],
    out: Path,
    *,
    weights: str,
    settings: Settings,
    language_only: bool,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> tuple[dict[str, Any], list[dict], list[dict] | None]:
    """Predicts and scores one task, writes OUT/NAME.jsonl and OUT/NAME.json.

    Returns:
      scores (with `reused`, the answers that were there already), prediction rows, language-only rows (None when not
      asked for).
    """
    require_scorable(benchmark, items)

    def report(label):
        return (lambda done: on_progress(done, len(items), label)) if on_progress else None

    with Predictions(out / f"{name}.jsonl", settings.fingerprint(weights)) as predictions:
        reused = sum(predictions.get(item, False) is not None for item in items)
        rows = predict(generator, items, settings, predictions, language_only=False, on_progress=report(name))
        blind = (
            predict(
                generator,
                items,
                settings,
                predictions,
                language_only=True,
                on_progress=report(f"{name} without images"),
            )
            if language_only
            else None
        )
    result = summarise(benchmark, items, rows, blind) | {"settings": dataclasses.asdict(settings), "weights": weights}
    write_json(out / f"{name}.json", result)
    return result | {"reused": reused}, rows, blind
