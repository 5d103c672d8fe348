"""Counts of a batch that a family defines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Counts:
    """Scalars that a batch is described by, for display and FLOPs.

    Attributes:
      names: of all scalars; `tokens` and `samples` are among them. shown: those that metrics.jsonl holds.
      function: (batch) -> float32 scalars by name, computed on the device.
    """

    names: tuple[str, ...]
    shown: tuple[str, ...]
    function: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step: `language` alone, `vision` = tower and projector."""

    language: float
    vision: float
