"""Scores as tables for a terminal and for run.log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def score_table(scores: Mapping[str, Any], title: str) -> Table:
    """Return the scores of a run's newest evaluation: one row a task, benchmarks below."""
    rows = [(name, task["metric"].replace("_", " "), task["score"], task) for name, task in scores["tasks"].items()]
    benchmarks = scores.get("benchmarks") or {}
    standin = " (stand-in)" if benchmarks.get("standins") else ""
    rows += [
        (task["title"].removesuffix(" (stand-in)") + standin, task["metric"].replace("_", " "), task["score"], task)
        for task in benchmarks.get("tasks", {}).values()
    ]
    return _table(title, rows)


def results_table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return the results of `mindvl evaluate`: one row a task."""
    return _table(
        title, [(name, result["metric"].replace("_", " "), result["score"], result) for name, result in results.items()]
    )


def _table(title: str, rows: list[tuple[str, str, float, Mapping[str, Any]]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for column in ("score", "95 % interval", "samples", "without images", "majority"):
        table.add_column(column, justify="right")
    table.add_column("notes")
    for name, metric, score, task in rows:
        low, high = task["ci95"]
        blind, majority = (
            "" if task.get(key) is None else f"{task[key]:.3f}" for key in ("language_only", "blind_majority")
        )
        notes = f"{task['errors']} unreadable, count as wrong" if task.get("errors") else ""
        cells = (name, metric, f"{score:.3f}", f"{low:.3f} to {high:.3f}", str(task["n"]), blind, majority, notes)
        table.add_row(*(Text(cell) for cell in cells))  # Text: a name may hold console markup
    if len(rows) > 1 and len({metric for _, metric, _, _ in rows}) == 1:
        table.add_section()
        table.add_row("mean", "", f"{sum(row[2] for row in rows) / len(rows):.3f}")
    return table


def leaderboard(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return one row a model and one column a task. The best score of a task is bold."""
    tasks = list(dict.fromkeys(task for results in models.values() for task in results))
    best = {task: max(results[task]["score"] for results in models.values() if task in results) for task in tasks}
    table = Table(title="models", title_justify="left")
    table.add_column("model")
    for task in tasks:
        table.add_column(Text(task), justify="right")
    table.add_column("mean", justify="right")
    for model, results in models.items():
        cells = []
        for task in tasks:
            text = f"{results[task]['score']:.3f}" if task in results else "–"
            cells.append(Text(text, style="bold" if task in results and results[task]["score"] == best[task] else ""))
        whole = all(task in results for task in tasks)
        cells.append(
            Text(f"{sum(results[task]['score'] for task in tasks) / len(tasks):.3f}" if whole and tasks else "–")
        )
        table.add_row(Text(model), *cells)
    return table
