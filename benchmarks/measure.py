"""Interleaved timing: sides alternate, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass
class Side:
    """One way to do the work.

    Attributes:
      run: runs the work once and blocks until the device has finished.
      work: amount of work of one call, by unit: {"tokens": 2048, "samples": 12}.
      facts: other figures, with the unit in the name ("compile s").
      size: instead of `run` and `work`, in comparisons of sizes: the measured size.
    """

    name: str
    run: Callable[[], Any] | None = None
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    facts: dict[str, float | str] = dataclasses.field(default_factory=dict)
    size: float | None = None


@dataclasses.dataclass
class Comparison:
    """Sides that do the same work; the first is ours.

    Attributes:
      unit: of the ratio; every side's `work` has it. In a comparison of sizes, the unit of the sizes (smaller is
        better).
      checked: results of the comparison made before timing, which shows that the sides do the same work ({"loss
        difference": 3e-6}).
      bars: side -> ratio wanted of the first side against it.
      clock: wall time, or processor time of the whole process (for work that is measured a core).
      bound: seconds below which this machine cannot do the work (its measured matmul peak and copy bandwidth), where
        known.
    """

    name: str
    sides: Sequence[Side]
    unit: str
    checked: dict[str, float | str] = dataclasses.field(default_factory=dict)
    bars: dict[str, float] = dataclasses.field(default_factory=dict)
    clock: Literal["wall", "cpu"] = "wall"
    note: str = ""
    bound: float | None = None

    def __post_init__(self):
        names = [side.name for side in self.sides]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two sides have one name: {names}")
        self.of_sizes = all(side.size is not None for side in self.sides)
        lacking = [side.name for side in self.sides if side.run is None or not side.work.get(self.unit, 0) > 0]
        if lacking and not self.of_sizes:
            raise ValueError(f"{self.name}: {', '.join(lacking)} do not say how many {self.unit} a call does")
        unknown = set(self.bars) - set(names[1:])
        if unknown:
            raise ValueError(f"{self.name}: bars against {sorted(unknown)}, which are not sides; there are {names[1:]}")


def interleave(
    sides: Sequence[Side],
    *,
    seconds: float,
    least: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    most: int = 300,
) -> dict[str, list[float]]:
    """Time each side once in every round, in rotating order. Returns the times by name.

    Args:
      seconds: wanted measuring time of a side; rounds continue until the slowest side has had it. least, most: bounds
        on the rounds.
      warm_up: untimed rounds before.
    """
    for _ in range(warm_up):
        for side in sides:
            side.run()
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    enabled = gc.isenabled()
    gc.disable()  # a garbage collection during one side would count against it
    gc.collect()
    # exclude the libraries' objects from collection between rounds: walking them takes a quarter of a second
    gc.freeze()
    try:
        spent, round_number = 0.0, 0
        while round_number < least or (spent < seconds and round_number < most):
            shift = round_number % len(sides)
            slowest = 0.0
            for side in [*sides[shift:], *sides[:shift]]:
                start = clock()
                side.run()
                times[side.name].append(clock() - start)
                slowest = max(slowest, times[side.name][-1])
            spent += slowest
            round_number += 1
            gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return times


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratio of the first side's rate to another's: median and 95 % interval."""

    against: str
    value: float
    low: float
    high: float


def rate_ratio(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    our_work: float,
    their_work: float,
    against: str,
    draws: int = 4000,
    seed: int = 0,
) -> Ratio:
    """Ratio of median rates.

    The interval is a bootstrap over whole rounds, because the times of a round share the machine's load.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} rounds of ours and {len(b)} of {against}: not measured together")
    factor = our_work / their_work
    picks = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    drawn = np.median(b[picks], axis=1) / np.median(a[picks], axis=1) * factor
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(against, float(np.median(b) / np.median(a) * factor), float(low), float(high))


def _times(other: float, own: float) -> float:
    """other / own; 0 / 0 is 1 (counts may be 0)."""
    if own:
        return other / own
    return float("inf") if other else 1.0


def _sizes(comparison: Comparison) -> dict[str, Any]:
    first, *others = comparison.sides
    ratios = [
        dict(
            against=other.name,
            value=_times(other.size, first.size),
            low=None,
            high=None,
            bar=comparison.bars.get(other.name),
        )
        for other in others
    ]
    sides = [dict(name=side.name, size=side.size, facts=side.facts) for side in comparison.sides]
    return dict(rounds=1, sides=sides, ratios=ratios)


def measure(comparison: Comparison, *, seconds: float, least: int) -> dict[str, Any]:
    """Measure a comparison. Returns its record as plain data, as it is stored."""
    first, *others = comparison.sides
    common = dict(
        name=comparison.name,
        unit=comparison.unit,
        clock=comparison.clock,
        checked=comparison.checked,
        note=comparison.note,
        of_sizes=comparison.of_sizes,
    )
    if comparison.of_sizes:
        return common | _sizes(comparison)
    clock = CLOCKS[comparison.clock]
    times = interleave(comparison.sides, seconds=seconds, least=least, clock=clock)
    sides = []
    for side in comparison.sides:
        own = np.asarray(times[side.name])
        low, middle, high = (float(x) for x in np.percentile(own, [25, 50, 75]))
        rates = {unit: amount / middle for unit, amount in side.work.items()}
        if comparison.bound is not None:
            side.facts["share of what the machine can do"] = comparison.bound / middle
        sides.append(
            dict(
                name=side.name,
                seconds=[float(f"{x:.6g}") for x in own],
                median=middle,
                low=low,
                high=high,
                work=side.work,
                rates=rates,
                facts=side.facts,
            )
        )
    ratios = [
        dataclasses.asdict(
            rate_ratio(
                times[first.name],
                times[other.name],
                our_work=first.work[comparison.unit],
                their_work=other.work[comparison.unit],
                against=other.name,
            )
        )
        | {"bar": comparison.bars.get(other.name)}
        for other in others
    ]
    return common | dict(rounds=len(times[first.name]), sides=sides, ratios=ratios)
