"""What a run writes down: metrics.jsonl, one object a step, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from mindvl_jax.core.files import replacing

FILE = "metrics.jsonl"


def _plain(value: Any) -> Any:
    """JSON has no NaN; a value that is not finite is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int) -> int:
    """Drops the lines of steps after `last_step`, and a last line that was cut off by a crash; returns how many were dropped.

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


def _summary_writer_class() -> type:
    """tensorboardX's writer. It imports torch where it finds it, to accept torch tensors; here are none, and torch takes seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # an import of it now fails, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class MetricsLog:
    """Appends one JSON object a step, each in a single write, and mirrors the numbers to TensorBoard."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, first_step: int):
        cut_metrics(run_dir / FILE, first_step)
        self._file = (run_dir / FILE).open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            # purge_step hides what an earlier process logged beyond the restored step.
            self._board = _summary_writer_class()(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None, flush_secs=30)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
