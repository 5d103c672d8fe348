"""The HTML page of a run: tables and an image of each comparison, in one file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.results import Record

OURS, OTHER = "#2f6f9f", "#b8c2cc"


def render(record: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= dict(
        number=results.number,
        fact=results.fact,
        duration=results.duration,
        ratio_text=results.ratio_text,
        bar_text=results.bar_text,
    )
    pictures = {
        (name, one["name"]): picture(one) for name, outcome in record["cases"].items() for one in outcome["comparisons"]
    }
    return environment.get_template("results.html.jinja").render(**record, pictures=pictures)


def picture(comparison: Mapping[str, Any]) -> str:
    """Rates as bars with every round as a dot (or sizes as bars), PNG in base64."""
    sides, unit = comparison["sides"], comparison["unit"]
    figure = Figure(figsize=(8, 0.55 + 0.42 * len(sides)), layout="constrained")
    axes = figure.subplots()
    for row, side in enumerate(sides):
        colour = OURS if row == 0 else OTHER
        if comparison["of_sizes"]:
            axes.barh(row, side["size"], 0.62, color=colour)
            continue
        amount = side["work"][unit]
        axes.barh(row, amount / side["median"], 0.62, color=colour)
        axes.scatter(
            [amount / seconds for seconds in side["seconds"]],
            [row] * len(side["seconds"]),
            s=6,
            color="#1d2733",
            alpha=0.45,
            linewidths=0,
            zorder=3,
        )
    axes.set_yticks(range(len(sides)), [side["name"] for side in sides], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit if comparison["of_sizes"] else f"{unit}/s", fontsize=8)
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def write(record: Record, folder: Path) -> tuple[Path, Path]:
    """Write DATE-COMMIT-SUITE.json and .html; a second run of the minute does not overwrite the first."""
    folder.mkdir(parents=True, exist_ok=True)
    about = record["machine"]
    date, commit = about["date"][:16].replace(":", ""), about["commit"].replace("+", "-")
    stem = f"{date}-{commit}-{record['suite']}{'-dry' if record['settings']['dry'] else ''}"
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    path.write_text(json.dumps(record) + "\n")
    page = path.with_suffix(".html")
    page.write_text(render(record), encoding="utf-8")
    return path, page
