"""What a check found, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Outcome(enum.Enum):
    OK = "ok"
    UNSURE = "unsure"  # it may do; the mend says what would make it certain
    FAILED = "failed"
    LEFT_OUT = "left out"  # not checked; `found` says why


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      group: host, network, operators, collectives, training.
      check: what was looked at. found: what was there. mend: what to do, empty when all is well.
    """

    group: str
    check: str
    outcome: Outcome
    found: str
    mend: str = ""

    def __post_init__(self):
        if self.outcome is Outcome.FAILED and not self.mend:
            raise ValueError(f"npu_bridge.doctor: {self.group}/{self.check} failed and says no mend")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"outcome": self.outcome.value}


@dataclasses.dataclass(frozen=True)
class Group:
    """Makes the findings of one group."""

    name: str

    def ok(self, check: str, found: str) -> Finding:
        return Finding(self.name, check, Outcome.OK, found)

    def unsure(self, check: str, found: str, mend: str) -> Finding:
        return Finding(self.name, check, Outcome.UNSURE, found, mend)

    def failed(self, check: str, found: str, mend: str) -> Finding:
        return Finding(self.name, check, Outcome.FAILED, found, mend)

    def left_out(self, check: str, why: str) -> Finding:
        return Finding(self.name, check, Outcome.LEFT_OUT, why)
