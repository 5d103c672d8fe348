"""Table and plot of a profile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from mindvl_jax.profiling.blocks import HOST, BlockTimes

ROWS = 20


def write(folder: Path, times: BlockTimes, *, first: int, steps: int, seconds: float, memory: Sequence[Any]) -> str:
    """Write blocks.json, profile.txt, memory.json and profile.png into `folder`. Returns the table.

    Args:
      seconds: wall time of all profiled steps. memory: samples of `seconds` and `bytes`.
    """
    seconds -= times.aside
    per_step = {name: value / steps for name, value in times.seconds.items()}
    per_step[HOST] = max(0.0, seconds - times.busy) / steps
    lines = sorted(per_step.items(), key=lambda item: -item[1])
    record = {
        "first_step": first,
        "steps": steps,
        "seconds_per_step": seconds / steps,
        "blocks": dict(lines),
        "notes": list(times.notes),
    }
    (folder / "blocks.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "memory.json").write_text(json.dumps([dataclasses.asdict(sample) for sample in memory]), encoding="utf-8")
    text = "\n".join([table(lines, first, steps, seconds), *times.notes])
    (folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
    _picture(folder / "profile.png", lines, memory)
    return f"{text}\n{folder / 'profile.png'}"


def table(lines: Sequence[tuple[str, float]], first: int, steps: int, seconds: float) -> str:
    whole = seconds / steps
    said = [
        f"steps {first} to {first + steps - 1}: {whole * 1e3:.1f} ms a step",
        f"{'block':32} {'ms a step':>10} {'share':>7}",
    ]
    shown, rest = lines[:ROWS], lines[ROWS:]
    said += [f"{name:32} {value * 1e3:10.2f} {value / whole:7.1%}" for name, value in shown]
    if rest:
        value = sum(value for _, value in rest)
        said.append(f"{f'{len(rest)} more':32} {value * 1e3:10.2f} {value / whole:7.1%}")
    return "\n".join(said)


def _picture(path: Path, lines: Sequence[tuple[str, float]], memory: Sequence[Any]) -> None:
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2))
    names = [name for name, _ in lines[:ROWS]][::-1]
    left.barh(names, [value * 1e3 for _, value in lines[:ROWS]][::-1])
    left.set_xlabel("ms a step")
    right.plot([sample.seconds for sample in memory], [sample.bytes / 2**20 for sample in memory])
    right.set_xlabel("seconds")
    right.set_ylabel("MiB in use")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
