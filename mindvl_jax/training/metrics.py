"""Metrics of a run: metrics.jsonl, one object per step, and the trackers of `loggers`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.core.files import replacing
from mindvl_jax.training.loggers import ShownAnswer, Tracker, numbers_of

FILE = "metrics.jsonl"


def _plain(value: Any) -> Any:
    """JSON has no NaN; a value that is not finite is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int) -> int:
    """Drop the lines of steps after `last_step`, and a last line that was cut off by a crash; return how many were
    dropped.

    The file is replaced in one move, so a crash here loses nothing.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            try:
                fits = line.endswith("\n") and json.loads(line)["step"] <= last_step
            except (ValueError, KeyError, TypeError, RecursionError):
                fits = False
            if fits:
                kept.append(line)
            else:
                dropped += 1
    if dropped:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
    return dropped


class MetricsLog:
    """Append one JSON object a step, each in a single write, and hand the numbers to the trackers."""

    def __init__(self, run_dir: Path, *, trackers: Sequence[Tracker] = (), first_step: int):
        cut_metrics(run_dir / FILE, first_step)
        self._file = (run_dir / FILE).open("a", encoding="utf-8")
        self._trackers = tuple(trackers)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()
        self.track(numbers_of(record), record["step"])

    def track(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand numbers to the trackers alone, such as the scores of an evaluation."""
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def show(self, answers: Sequence[ShownAnswer], step: int) -> None:
        """Hand the answers of an evaluation to the trackers."""
        if answers:
            for tracker in self._trackers:
                tracker.show(answers, step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
