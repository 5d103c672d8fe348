"""Curves of a run as data for the charts of its report (`core/templates/charts.js` draws them)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from mindvl_jax.evaluation.plots import smooth

SOURCE = "loss/"  # metrics keys of single sources' losses
PART = "grad_norm/"  # and of single parts' gradient norms
EXPERT = "expert_load/"  # and of single experts' loads, as layer.expert
POINTS = 400  # of a line: a screen shows no more


def charts(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts that the metrics have values for: loss of everything, gradients, rate, speed, MFU, packing and
    experts.

    Lines are smoothed inside a phase: another phase is other data, and its beginning must not bend the end of the one
    before.
    """
    names = list(dict.fromkeys(key for row in metrics for key in row))
    sources = sorted(name for name in names if name.startswith(SOURCE))
    parts = sorted(name for name in names if name.startswith(PART))
    wanted: list[tuple[str, list[tuple[str, str, bool]], bool, bool]] = [
        (
            "Loss",
            [
                ("loss", "loss", True),
                ("validation", "validation_loss", False),
                *((name.removeprefix(SOURCE), name, True) for name in sources),
            ],
            True,
            True,
        ),
        (
            "Gradient norm",
            [("all", "grad_norm", True), *((name.removeprefix(PART), name, True) for name in parts)],
            True,
            False,
        ),
        ("Learning rate", [("rate", "learning_rate", False)], False, False),
        ("Tokens a second", [("tokens", "tokens_per_second", True)], False, False),
        ("MFU: share of the devices' peak", [("all", "mfu", True), ("language", "mfu_language", True)], False, False),
        (
            "Packing: share of a batch that is no padding",
            [("tokens", "token_efficiency", True), ("patches", "patch_efficiency", True)],
            False,
            False,
        ),
        *_expert_charts(names),
    ]
    return [
        chart for title, lines, log, tall in wanted if (chart := _chart(metrics, title, lines, log, tall)) is not None
    ]


def _expert_charts(names: Sequence[str]) -> list[tuple[str, list[tuple[str, str, bool]], bool, bool]]:
    """Load of every expert over time, a chart for each routed layer; of large models the busiest experts alone."""
    layers: dict[str, list[tuple[str, str, bool]]] = {}
    for name in names:
        if name.startswith(EXPERT):
            layer, expert = name.removeprefix(EXPERT).split(".")
            layers.setdefault(layer, []).append((f"expert {expert}", name, True))
    busiest = [("worst layer", "expert_load_worst", True), ("mean of layers", "expert_load_mean", True)]
    return [
        *(
            (f"Load of experts, routed layer {layer}: 1 is even", lines, False, False)
            for layer, lines in layers.items()
        ),
        ("Load of the busiest expert: 1 is even", busiest, False, False),
        ("Largest selection bias", [("bias", "router_bias", False)], False, False),
        ("Dropped tokens", [("tokens", "dropped_tokens", False)], False, False),
    ]


def _chart(
    metrics: Sequence[dict[str, Any]], title: str, wanted: Sequence[tuple[str, str, bool]], log: bool, tall: bool
) -> dict[str, Any] | None:
    phases = _phases(metrics)
    lines = [
        line for label, key, averaged in wanted if (line := _line(metrics, phases, label, key, averaged)) is not None
    ]
    if not lines:
        return None
    values = [value for line in lines for value in line["values"] if value is not None]
    log = log and min(values, default=0) > 0 and max(values) / min(values) > 20
    named = [
        {"name": name, "first": metrics[start]["step"], "last": metrics[end - 1]["step"]} for name, start, end in phases
    ]
    return {
        "title": title,
        "lines": lines,
        "phases": named,
        "first": metrics[0]["step"],
        "last": metrics[-1]["step"],
        "log": log,
        "tall": tall,
    }


def _phases(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """(name, first row, row after the last) of each phase."""
    borders = (
        [0]
        + [index for index in range(1, len(metrics)) if metrics[index].get("phase") != metrics[index - 1].get("phase")]
        + [len(metrics)]
    )
    return [(metrics[start].get("phase", ""), start, end) for start, end in itertools.pairwise(borders)]


def _line(
    metrics: Sequence[dict[str, Any]], phases: Sequence[tuple[str, int, int]], label: str, key: str, averaged: bool
) -> dict[str, Any] | None:
    """A line with a gap (null) between phases; rows without a value are left out, so that rare checks still make a
    line.
    """
    window = max(1, len(metrics) // 60) if averaged else 1
    steps: list[int] = []
    values: list[float | None] = []
    for _, start, end in phases:
        rows = [row for row in metrics[start:end] if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
        if not rows:
            continue
        if steps:
            steps.append(rows[0]["step"])
            values.append(None)
        averages = smooth([row[key] for row in rows], min(window, len(rows)))
        stride = max(1, len(rows) * len(phases) // POINTS)
        chosen = sorted({*range(0, len(rows), stride), len(rows) - 1})
        steps += [rows[index]["step"] for index in chosen]
        values += [float(f"{averages[index]:.5g}") for index in chosen]
    return {"name": label, "steps": steps, "values": values} if steps else None
