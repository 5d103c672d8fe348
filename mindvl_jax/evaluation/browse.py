"""Pages to look through predictions: one with all tasks' scores, one a task with its samples and images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text
from mindvl_jax.evaluation.benchmarks import Benchmark
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.pages import picture_uri, render
from mindvl_jax.evaluation.plots import data_uri
from mindvl_jax.inference.prompts import read_picture

MOST = 600  # samples on a task's page: enough to look through, small enough to open
SIDE = 320


def write_task_page(
    out: Path,
    name: str,
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: Sequence[dict],
    blind: Sequence[dict] | None,
    result: dict[str, Any],
) -> Path:
    """Write OUT/NAME.html: scores and samples with their images, evenly taken when there are more than a page holds."""
    step = max(1, -(-len(items) // MOST))
    shown = []
    for index in range(0, len(items), step):
        item, row = items[index], rows[index]
        shown.append(
            {
                "id": item.id,
                "question": item.question,
                "answers": list(dict.fromkeys(item.answers)),
                "prediction": row["prediction"],
                "error": row.get("error"),
                "category": item.category,
                "score": benchmark.score(item, row["prediction"])[benchmark.metric],
                "blind": None if blind is None else blind[index]["prediction"],
                "pictures": _pictures(item),
            }
        )
    shown.sort(key=lambda row: row["score"])  # what went wrong first
    notes = [f"{result['errors']} samples could not be read and count as wrong."] if result["errors"] else []
    if step > 1:
        notes.append(f"Every {step}th of {len(items)} samples is shown; all predictions stand in {name}.jsonl.")
    page = render(
        "predictions.html.jinja",
        title=benchmark.title,
        subtitle=_subtitle(result),
        notes=notes,
        links=[("index.html", "all tasks"), *_report(out)],
        tasks=[score_line(result)],
        plots=[],
        rows=shown,
        categories=sorted({item.category for item in items if item.category}),
    )
    write_text(out / f"{name}.html", page)
    return out / f"{name}.html"


def write_index(
    out: Path,
    results: dict[str, dict[str, Any]],
    figures: Sequence[tuple[str, Any]] = (),
    notes: Sequence[str] = (),
    *,
    name: str = "index",
) -> Path:
    """Write OUT/NAME.html: the table of all tasks, linked to their pages, and images of a search."""
    page = render(
        "predictions.html.jinja",
        title=f"Evaluation: {out.resolve().parent.name if out.name.startswith('evaluation') else out.resolve().name}",
        subtitle=_subtitle(next(iter(results.values()))),
        notes=list(notes),
        links=[*([] if name == "index" else [("index.html", "all tasks")]), *_report(out)],
        tasks=[
            score_line(result, f"{task}.html" if (out / f"{task}.html").is_file() else None)
            for task, result in results.items()
        ],
        plots=[{"name": title, "data": data_uri(figure)} for title, figure in figures],
        rows=[],
        categories=[],
    )
    write_text(out / f"{name}.html", page)
    return out / f"{name}.html"


def _report(out: Path) -> list[tuple[str, str]]:
    """Link to the report of the run that a folder of results lies in."""
    return [("../report.html", "report of the run")] if (out.parent / "report.html").is_file() else []


def score_line(result: dict[str, Any], page: str | None = None) -> dict[str, Any]:
    """A task's line of the table, linked to `page`."""
    known = ("relaxed_accuracy_swapped", "circular_accuracy", "mme_perception", "mme_cognition")
    more = [f"{key.replace('_', ' ')} {result[key]}" for key in known if key in result]
    if len(result.get("by_category", {})) <= 4:
        more += [f"{category} {entry['score']:.3f}" for category, entry in result.get("by_category", {}).items()]
    return {
        "title": result["title"],
        "metric": result["metric"].replace("_", " "),
        "score": result["score"],
        "ci95": result["ci95"],
        "n": result["n"],
        "language_only": result.get("language_only"),
        "more": ", ".join(more),
        "page": page,
    }


def _subtitle(result: dict[str, Any]) -> str:
    settings = result.get("settings", {})
    pixels = [f"{key} {settings[key]:,}" for key in ("min_pixels", "max_pixels") if settings.get(key)]
    return ", ".join([f"written {time.strftime('%Y-%m-%d %H:%M')}", *pixels])


def _pictures(item: Item) -> list[str]:
    uris = []
    for image in item.images:
        try:
            uris.append(picture_uri(read_picture(image), largest=SIDE))
        except UserError:  # its row says why
            continue
    return uris
