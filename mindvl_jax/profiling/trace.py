"""Read the device time of each operation from a trace of `jax.profiler`."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

from mindvl_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Times in seconds, summed over the traced steps and all local devices.

    Attributes:
      operations: by (program's name, operation's name).
      busy: time in which at least one operation ran, by device or thread pool; overlapping operations count once.
    """

    operations: dict[tuple[str, str], float]
    busy: float


def read(folder: Path) -> DeviceTime:
    """Read the newest trace under `folder`.

    Raises:
      UserError: no trace, or no device operation in it.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder} holds no trace (*.xplane.pb)")
    operations: collections.Counter[tuple[str, str]] = collections.Counter()
    intervals: list[tuple[float, float]] = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" not in stats:
                    continue
                operations[str(stats.get("hlo_module", "")), str(stats["hlo_op"])] += event.duration_ns / 1e9
                intervals.append((event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9))
    if not operations:
        raise UserError(f"{files[-1].name} holds no operation of a compiled program; profile at least one whole step")
    return DeviceTime(dict(operations), _union(intervals))


def _union(intervals: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
