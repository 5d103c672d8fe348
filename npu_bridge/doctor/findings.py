"""Findings of the checks, with the fix for each."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Outcome(enum.Enum):
    OK = "ok"
    UNSURE = "unsure"  # may work; `fix` says how to make sure
    FAILED = "failed"
    LEFT_OUT = "left out"  # not checked; `found` says why


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      group: host, network, operators, collectives, training.
      check: what was checked. found: the result. fix: what to do, empty when nothing is wrong.
    """

    group: str
    check: str
    outcome: Outcome
    found: str
    fix: str = ""

    def __post_init__(self):
        if self.outcome is Outcome.FAILED and not self.fix:
            raise ValueError(f"npu_bridge.doctor: {self.group}/{self.check} failed without a fix")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"outcome": self.outcome.value}


@dataclasses.dataclass(frozen=True)
class Group:
    """Create the findings of one group."""

    name: str

    def ok(self, check: str, found: str) -> Finding:
        return Finding(self.name, check, Outcome.OK, found)

    def unsure(self, check: str, found: str, fix: str) -> Finding:
        return Finding(self.name, check, Outcome.UNSURE, found, fix)

    def failed(self, check: str, found: str, fix: str) -> Finding:
        return Finding(self.name, check, Outcome.FAILED, found, fix)

    def left_out(self, check: str, why: str) -> Finding:
        return Finding(self.name, check, Outcome.LEFT_OUT, why)
