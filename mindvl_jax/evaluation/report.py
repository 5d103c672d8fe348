"""report.html of a run folder: scores, gains, curves, answers beside their images, configuration, machine."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, read_jsonl, write_text
from mindvl_jax.evaluation.browse import score_line
from mindvl_jax.evaluation.curves import charts
from mindvl_jax.evaluation.pages import picture_uri, render


def write_report(run_dir: str | Path) -> Path:
    """Write report.html from what the run folder holds; parts that are not there are left out.

    Returns:
      Path of the page.

    Raises:
      UserError: no such folder, or nothing in it to report.
    """
    run_dir = Path(run_dir)
    metrics = [
        row
        for row in read_jsonl(run_dir / "metrics.jsonl", whole=False)
        if isinstance(row.get("step"), int) and isinstance(row.get("phase", ""), str) and _is_number(row.get("loss"))
    ]
    scores = _scores(run_dir / "scores.json")
    if not metrics and not scores["tasks"] and "benchmarks" not in scores:
        raise UserError(
            f"{run_dir} has neither metrics.jsonl nor scores.json: it is no run folder, or the run has not taken a step"
        )
    config = run_dir / "config.yaml"
    phases = list(dict.fromkeys(row.get("phase", "") for row in metrics))
    page = render(
        "report.html.jinja",
        title=f"MindVL run: {run_dir.resolve().name}",
        subtitle=f"written {time.strftime('%Y-%m-%d %H:%M')}" + (f", {' → '.join(phases)}" if phases else ""),
        facts=_facts(metrics, scores),
        notes=_notes(metrics, scores),
        charts=charts(metrics) if len(metrics) > 1 else [],
        links=_links(run_dir),
        images=_images(run_dir),
        phase_rows=_phase_rows(metrics),
        samples=_samples(run_dir / "predictions" / scores.get("phase", ""), scores["tasks"]),
        benchmarks=_benchmarks(
            run_dir / "predictions" / scores.get("phase", "") / "benchmarks", scores.get("benchmarks")
        ),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        machine=_machine(),
        **_score_table(scores),
    )
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def _images(run_dir: Path) -> list[dict[str, str]]:
    """The images that lie in RUN/images, such as generated ones."""
    return [
        {"name": path.stem, "data": picture_uri(path.read_bytes())}
        for path in sorted((run_dir / "images").glob("*.png"))
    ]


def _human(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan  # a non-finite value is null in the file


def _facts(metrics: list[dict], scores: dict) -> list[tuple[str, str]]:
    facts = []
    if metrics:
        seconds, tokens, samples = (_total(metrics, metrics, key) for key in ("seconds", "tokens", "samples"))
        facts += [
            ("steps", f"{metrics[-1]['step']:,}"),
            ("training time", f"{seconds / 60:.1f} min"),
            ("samples", _human(samples)),
            ("tokens", _human(tokens)),
        ]
        if seconds:
            facts.append(("tokens a second", _human(tokens / seconds)))
        facts.append(("last loss", f"{_number(metrics[-1].get('loss')):.3f}"))
    if scores["tasks"]:
        facts.append(
            (
                "mean of tasks",
                f"{sum(task['score'] for task in scores['tasks'].values()) / len(scores['tasks']):.3f}",
            )
        )
    return facts


def _total(metrics: list[dict], own: list[dict], key: str) -> float:
    """Seconds, tokens or samples over the rows `own`, a run of `metrics`.

    The running totals also count steps that were not logged.
    """
    if f"{key}_total" in own[-1]:
        first = metrics.index(own[0])
        return own[-1][f"{key}_total"] - (metrics[first - 1].get(f"{key}_total", 0) if first else 0)
    return sum(row.get({"seconds": "step_seconds"}.get(key, key)) or 0 for row in own)


def _notes(metrics: list[dict], scores: dict) -> list[str]:
    notes = []
    skipped = int(metrics[-1].get("skipped_steps") or 0) if metrics else 0
    if skipped:
        notes.append(f"{skipped} steps had a loss or gradient that is not finite and were skipped.")
    for name, task in {**scores["tasks"], **scores.get("benchmarks", {}).get("tasks", {})}.items():
        if task.get("errors"):
            notes.append(f"{task['errors']} of {task['n']} samples of {name} could not be read and count as wrong.")
    return notes


def _links(run_dir: Path) -> list[tuple[str, str]]:
    """Pages of the same run that are there."""
    pages = (
        ("evaluation/index.html", "evaluation"),
        ("evaluation/search.html", "resolution search"),
        ("evaluation-ema/index.html", "evaluation of the moving average"),
        ("evaluation-best/index.html", "evaluation of the best checkpoint"),
    )
    return [(path, label) for path, label in pages if (run_dir / path).is_file()]


def _phase_rows(metrics: list[dict]) -> list[dict[str, Any]]:
    rows = []
    for phase in dict.fromkeys(row.get("phase", "") for row in metrics):
        own = [row for row in metrics if row.get("phase", "") == phase]
        seconds, tokens, samples = (_total(metrics, own, key) for key in ("seconds", "tokens", "samples"))
        before = metrics.index(own[0])
        rows.append(
            {
                "name": phase,
                "steps": own[-1]["step"] - (metrics[before - 1]["step"] if before else 0),
                "first_loss": f"{_number(own[0].get('loss')):.3f}",
                "last_loss": f"{_number(own[-1].get('loss')):.3f}",
                "samples": f"{samples:,.0f}",
                "tokens": f"{tokens:,.0f}",
                "rate": _human(tokens / seconds) if seconds else "–",
                "seconds": f"{seconds:.0f}",
            }
        )
    return rows


def _score_table(scores: dict) -> dict[str, Any]:
    phases = list(dict.fromkeys(phase for task in scores["tasks"].values() for phase in task.get("by_phase", {})))
    steps = {
        phase: task["by_phase"][phase].get("step", 0)
        for phase in phases
        for task in scores["tasks"].values()
        if phase in task.get("by_phase", {})
    }
    phases.sort(key=steps.__getitem__)
    tasks, counts = [], set()
    for name, task in scores["tasks"].items():
        cells, before = [], None
        for phase in phases:
            found = task.get("by_phase", {}).get(phase)
            # Scores of other samples are not compared in colour: their difference is mostly chance.
            same = before is not None and found is not None and before["n"] == found["n"]
            cells.append(
                None
                if found is None
                else {
                    "score": found["score"],
                    "gain": None if before is None else found["score"] - before["score"],
                    "same": same,
                }
            )
            if found is not None:
                before = found
                if found["n"] < task["n"]:
                    counts.add(found["n"])
        floors = [value for value in (task.get("language_only"), task.get("blind_majority")) if value is not None]
        tasks.append(
            {
                "name": name,
                "metric": task["metric"],
                "score": task["score"],
                "ci95": task["ci95"],
                "n": task["n"],
                "language_only": task.get("language_only"),
                "blind_majority": task.get("blind_majority"),
                "floor": max(floors, default=None),
                "by_phase": cells,
            }
        )
    return {
        "tasks": tasks,
        "phases": phases,
        "fewer": " / ".join(f"{count} samples" for count in sorted(counts)),
        "has_language_only": any(task["language_only"] is not None for task in tasks),
        "has_blind": any(task["blind_majority"] is not None for task in tasks),
    }


def _benchmarks(folder: Path, found: dict | None) -> dict[str, Any] | None:
    """Describe benchmark files on the page; name stand-ins as such."""
    if not found:
        return None
    tasks = found["tasks"]
    groups = [{**group, "task": tasks[group["task"]]["title"]} for group in _samples(folder, tasks)]
    return {
        "heading": "Benchmarks" if found["standins"] is None else "Stand-in benchmark sets",
        "note": found["standins"],
        "tasks": [score_line(task) for task in tasks.values()],
        "samples": groups,
    }


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _scores(path: Path) -> dict[str, Any]:
    """Read scores.json.

    Raises:
      UserError: it is damaged.
    """
    try:
        scores = read_json(path, {"tasks": {}})
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to write the report without scores") from None
    tasks = scores.get("tasks") if isinstance(scores, dict) else None
    if (
        not isinstance(tasks, dict)
        or not isinstance(scores.get("phase", ""), str)
        or not all(isinstance(task, dict) and {"metric", "score", "ci95", "n"} <= set(task) for task in tasks.values())
    ):
        raise UserError(f"{path} is no file of scores; delete it to write the report without scores")
    return scores


def _picture(folder: Path, name: Any) -> str | None:
    """An image that the evaluation wrote; None for anything else that a damaged file may name."""
    if not isinstance(name, str) or not name.endswith(".png"):
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        return picture_uri(Image.open(path), largest=320)
    except (OSError, ValueError, SyntaxError):
        return None


def _whole(row: Mapping[str, Any]) -> bool:
    """Whether a line of a predictions file has all that the page shows."""
    return (
        isinstance(row.get("shown"), list)
        and _is_number(row.get("score", ""))
        and isinstance(row.get("answers"), list)
        and {"id", "question", "prediction"} <= set(row)
    )


def _samples(folder: Path, tasks: dict) -> list[dict[str, Any]]:
    groups = []
    for name in tasks:
        rows = [row for row in read_jsonl(folder / f"{name}.jsonl", whole=False) if _whole(row)]
        shown = []
        for row in rows:
            found = (_picture(folder, shown_name) for shown_name in row["shown"])
            pictures = [picture for picture in found if picture is not None]
            shown.append({**row, "error": row.get("error"), "pictures": pictures})
        if shown:
            groups.append({"task": name, "rows": sorted(shown, key=lambda row: row["score"])})
    return groups


def _machine() -> list[tuple[str, str]]:
    try:
        import jax

        devices = jax.devices()
        device = f"{len(devices)} x {devices[0].device_kind}"
    except RuntimeError:  # a report may be written where no backend starts
        device = "none"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    return [
        ("device", device),
        ("host cores", str(os.cpu_count())),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("versions", versions),
    ]
