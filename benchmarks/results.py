"""Results: tables, dated files, the page, and two runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.registry import Case

Record = dict[str, Any]


class Unusable(ValueError):
    """A run or case that does not exist or cannot be read; the message is for the user."""


def number(value: float) -> str:
    """Three or four figures, with thousands separated."""
    if value == 0 or 0.01 <= abs(value) < 1e15:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.1e}"


def fact(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def ratio_text(ratio: Mapping[str, Any]) -> str:
    spread = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{ratio['value']:.2f}x{spread}"


def bar_text(ratio: Mapping[str, Any]) -> str:
    if ratio.get("bar") is None:
        return ""
    return f"{ratio['bar']:g}x " + ("reached" if ratio["value"] >= ratio["bar"] else "missed")


def columns(comparison: Mapping[str, Any], side: Mapping[str, Any]) -> tuple[str, str, str]:
    """(median, quartiles, rate); a size stands where the median does."""
    if comparison["of_sizes"]:
        return f"{number(side['size'])} {comparison['unit']}", "", ""
    return (
        duration(side["median"]),
        f"{duration(side['low'])} - {duration(side['high'])}",
        f"{number(side['rates'][comparison['unit']])} {comparison['unit']}/s",
    )


def case_table(cases: Iterable[Case]) -> Table:
    table = Table("case", "suite", "what it measures", box=None)
    for entry in cases:
        table.add_row(entry.name, entry.suite, entry.summary)
    return table


def case_results_table(name: str, outcome: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{name}{' (broke)' if outcome['failed'] else ''}, {outcome['seconds']:.0f} s", title_justify="left"
    )
    for column in ("comparison", "side"):
        table.add_column(column, overflow="fold")
    for column in ("median", "quartiles", "rate", "ours against it [95 %]", "bar"):
        table.add_column(column, justify="right")
    for comparison in outcome["comparisons"]:
        ratios = {ratio["against"]: ratio for ratio in comparison["ratios"]}
        for index, side in enumerate(comparison["sides"]):
            ratio = ratios.get(side["name"])
            table.add_row(
                comparison["name"] if index == 0 else "",
                side["name"],
                *columns(comparison, side),
                ratio_text(ratio) if ratio else "",
                bar_text(ratio) if ratio else "",
                end_section=index == len(comparison["sides"]) - 1,
            )
    return table


def read(path: Path) -> Record:
    """A stored run.

    Raises:
      Unusable: no such file, or another kind of file.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise Unusable(
            f"{path}: {error.strerror}; expected a JSON file that `python -m benchmarks run` wrote"
        ) from None
    except ValueError as error:
        raise Unusable(f"{path}: not JSON ({error}); expected a file that `python -m benchmarks run` wrote") from None
    if not isinstance(record, dict) or not {"machine", "cases", "suite"} <= record.keys():
        raise Unusable(
            f"{path}: JSON without machine, suite and cases; expected a file that `python -m benchmarks run` wrote"
        )
    return record


def comparisons(record: Record) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(name, one["name"]): one for name, outcome in record["cases"].items() for one in outcome["comparisons"]}


def compare_table(before: Record, after: Record) -> Table:
    """Compare two runs: our time then and now, and each ratio, for every comparison that both have.

    Only ratios compare across machines and days. A ratio counts as changed only if the intervals do not overlap.
    Raises:
      Unusable: the runs have nothing in common.
    """
    then, now = comparisons(before), comparisons(after)
    common = [key for key in now if key in then]
    if not common:
        raise Unusable(
            f"the two results have no comparison in common: one has {', '.join(before['cases'])}, the other "
            f"{', '.join(after['cases'])}"
        )
    kinds = [f"{record['machine']['date'][:16]} {record['machine']['commit']}" for record in (before, after)]
    table = Table(
        "comparison",
        "against",
        *kinds,
        "change",
        title=None
        if _same_machine(before, after)
        else "Other machine, versions or threads: compare ratios only, and those with care",
    )
    for key in common:
        old, new = then[key], now[key]
        kind = "size" if new["of_sizes"] else "median"
        own_old, own_new = (one["sides"][0][kind] for one in (old, new))
        shown = [columns(one, one["sides"][0])[0] for one in (old, new)]
        table.add_row(
            f"{key[0]}: {key[1]}",
            "ours alone",
            *shown,
            f"{own_old / own_new:.2f}x as {'small' if new['of_sizes'] else 'fast'}",
        )
        old_ratios = {ratio["against"]: ratio for ratio in old["ratios"]}
        for ratio in new["ratios"]:
            if (last := old_ratios.get(ratio["against"])) is None:
                continue
            apart = ratio["low"] is None or ratio["low"] > last["high"] or ratio["high"] < last["low"]
            table.add_row(
                "",
                ratio["against"],
                ratio_text(last),
                ratio_text(ratio),
                f"{ratio['value'] / last['value'] - 1:+.0%}" if apart else "within the spread",
            )
    return table


def _same_machine(a: Record, b: Record) -> bool:
    changing = {"date", "commit", "load before"}
    return all(
        a["machine"].get(key) == b["machine"].get(key)
        for key in a["machine"].keys() | b["machine"].keys()
        if key not in changing
    )
