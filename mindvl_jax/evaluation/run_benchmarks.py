"""Benchmarks at the end of a training run: published prompts, metrics and summaries, as `mindvl evaluate` has them.

All questions of all benchmarks are answered in one go, each with its own bound on the answer: small files would
otherwise each leave slots empty at their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mindvl_jax.config.schema import BenchmarksConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, write_jsonl
from mindvl_jax.evaluation.benchmarks import STANDINS_MARK, Benchmark, find_benchmark, find_files, open_task
from mindvl_jax.evaluation.evaluate import require_scorable, summarise
from mindvl_jax.evaluation.images import keep_pictures
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.readers import read_rows
from mindvl_jax.inference import Answer, Generator, Request, Sampling
from mindvl_jax.inference.prompts import without_media

SHOWN = 4  # samples a benchmark whose images are kept for the report


Show = Callable[[int, int, str], None]
"""Told of progress: done, total, what."""


def counted(generator: Generator, requests: Sequence[Request], show: Show | None, label: str) -> list[Answer]:
    """Return the answers of all requests, those that failed too, and tell of each that is done."""
    if show is None:
        return generator.generate(requests, skip_errors=True)
    done = 0

    def count(index: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        show(done, len(requests), label)

    show(0, len(requests), label)
    return generator.generate(requests, skip_errors=True, on_answer=count)


def check_benchmarks(config: BenchmarksConfig) -> None:
    """Looks at the beginning of each benchmark's file: is it there, has it the columns, has it a row?

    Raises:
      UserError: all problems, one a line.
    """
    problems = []
    for name in config.tasks:
        try:
            for file in find_files(name, Path(config.folder)):
                next(read_rows(file, find_benchmark(name).columns), None)
        except UserError as error:
            problems.append(f"evaluation.benchmarks: {error}")
    if problems:
        raise UserError("\n".join(problems))


def evaluate_benchmarks(
    generator: Generator, config: BenchmarksConfig, out: Path, *, language_only: bool, on_progress: Show | None = None
) -> dict[str, Any]:
    """Score every benchmark of `config` and write OUT/TASK.jsonl, one line a question, with images of a few beside.

    Args:
      generator: its image sizes are those of the run.
      language_only: also answer with the images taken away.

    Returns:
      `standins` (what the folder says about itself when it is marked so, else None), `seconds`, and `tasks`: the
      summary of each by name.

    Raises:
      UserError: files that cannot be read.
    """
    started = time.perf_counter()
    folder = Path(config.folder)
    opened: dict[str, tuple[Benchmark, list[Item]]] = {}
    for name in config.tasks:
        benchmark, items = open_task(name, folder)
        opened[name] = benchmark, items[: config.max_samples]
        require_scorable(*opened[name])
    requests = [
        item.request(
            Sampling(max_new_tokens=min(benchmark.max_new_tokens, config.max_new_tokens or benchmark.max_new_tokens))
        )
        for benchmark, items in opened.values()
        for item in items
    ]
    answers = iter(counted(generator, requests, on_progress, "benchmarks"))
    blind = (
        iter(
            counted(
                generator, [without_media(request) for request in requests], on_progress, "benchmarks without images"
            )
        )
        if language_only
        else None
    )
    results = {}
    for name, (benchmark, items) in opened.items():
        rows = [_row(benchmark, item, next(answers)) for item in items]
        without = None if blind is None else [{"prediction": next(blind).text} for _ in items]
        results[name] = summarise(benchmark, items, rows, without)
        if without is not None:
            for row, item, unseen in zip(rows, items, without, strict=True):
                row |= {
                    "language_only_prediction": unseen["prediction"],
                    "language_only_score": benchmark.score(item, unseen["prediction"])[benchmark.metric],
                }
        if jax.process_index() == 0:
            keep_pictures(items, rows, out / name, SHOWN)
            write_jsonl(out / f"{name}.jsonl", rows)
    note = read_json(folder / STANDINS_MARK)
    return {
        "standins": None if note is None else note.get("what", "stand-ins"),
        "seconds": round(time.perf_counter() - started, 2),
        "tasks": results,
    }


def _row(benchmark: Benchmark, item: Item, answer: Answer) -> dict[str, Any]:
    row = {
        "id": item.id,
        "question": item.question,
        "answers": list(dict.fromkeys(item.answers)),
        "category": item.category,
        "prediction": answer.text,
        "score": benchmark.score(item, answer.text)[benchmark.metric],
    }
    return row | ({"error": answer.error} if answer.error else {})
