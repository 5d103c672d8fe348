"""Samples that cannot be used: written down with the reason, counted, never passed over in silence."""

from __future__ import annotations

import collections
import json
import os
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.questions import accepted_lines
from mindvl_jax.data.sample import SampleError

# Samples seen before a rate of errors says anything.
ENOUGH = 200
STAGES = ("encode", "decode")


class Quarantine:
    """Applies `data.on_error` and `data.max_error_rate`.

    Attributes:
      count: samples refused, an epoch's repetition counted again.
      seen: samples asked for.
      reasons: refusals by reason.
    """

    def __init__(self, path: str | None, *, policy: str, max_rate: float, limit_in_a_row: int):
        """`path` is the file that refusals are appended to (JSON lines), or None.

        `limit_in_a_row` refusals without one good sample stop the run whatever the rate allows: the data set has
        nothing to give.
        """
        self._path = path
        self._policy = policy
        self._max_rate = max_rate
        self._limit_in_a_row = limit_in_a_row
        # By stage: records that do not encode, and media of accepted samples that do not decode later. Counted apart,
        # because samples are encoded long before their batch is decoded, and a checkpoint keeps what belongs to its
        # batch.
        self._in_a_row = dict.fromkeys(STAGES, 0)
        self._reasons: dict[str, collections.Counter[str]] = {stage: collections.Counter() for stage in STAGES}
        self._written: set[str] = self._read_written()
        self.seen = 0

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    @property
    def reasons(self) -> collections.Counter[str]:
        return sum(self._reasons.values(), collections.Counter())

    def encoded(self) -> None:
        """Notes a sample that was accepted; its pixels have not been read yet."""
        self.seen += 1
        self._in_a_row["encode"] = 0

    def decoded(self) -> None:
        """Notes a sample whose pixels were read."""
        self._in_a_row["decode"] = 0

    def refuse(self, *, id: str, where: str, error: SampleError, stage: str = "encode") -> None:
        """Write a refused sample down. `stage` is `decode` for one that was accepted before its pixels were read.

        Raises UserError when the policy is `raise`, when refusals pass the rate, or when nothing but bad samples comes.
        """
        self.seen += stage == "encode"
        self._in_a_row[stage] += 1
        self._reasons[stage][error.reason] += 1
        if self._policy == "raise":
            raise UserError(
                f"sample {id!r} ({where}): {error} [data.on_error is raise; quarantine leaves such samples "
                "out and lists them]"
            )
        self._write({"id": id, "where": where, "reason": error.reason, "message": str(error)})
        listed = f"; they are listed in {self._path}" if self._path else ""
        if self.seen >= ENOUGH and self.count > self._max_rate * self.seen:
            raise UserError(
                f"{self.count} of {self.seen} samples are bad ({self._summary()}), more than "
                f"data.max_error_rate {self._max_rate:g} allows{listed}. The last one: {id!r} ({where}): "
                f"{error}{self._accepted()}"
            )
        if self._in_a_row[stage] >= self._limit_in_a_row:
            raise UserError(
                f"{self._in_a_row[stage]} bad samples in a row and no good one ({self._summary()}): there is "
                f"nothing to train on{listed}. The last one: {id!r} ({where}): {error}{self._accepted()}"
            )

    def _accepted(self) -> str:
        return accepted_lines() if "malformed" in self.reasons else ""

    def _summary(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(5))

    def _write(self, entry: dict[str, Any]) -> None:
        key = f"{entry['where']}|{entry['reason']}"
        if self._path is None or key in self._written:
            return
        self._written.add(key)
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _read_written(self) -> set[str]:
        """Entries of an earlier part of the same run: each bad sample is listed once."""
        if self._path is None or not os.path.exists(self._path):
            return set()
        keys = set()
        with open(self._path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    keys.add(f"{entry['where']}|{entry['reason']}")
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut off by a crash
        return keys

    def state(self, stage: str) -> dict[str, Any]:
        """JSON-able counts of one stage."""
        return {
            "seen": self.seen if stage == "encode" else 0,
            "in_a_row": self._in_a_row[stage],
            "reasons": dict(self._reasons[stage]),
        }

    def restore(self, stage: str, state: dict[str, Any]) -> None:
        if stage == "encode":
            self.seen = state["seen"]
        self._in_a_row[stage] = state["in_a_row"]
        self._reasons[stage] = collections.Counter(state["reasons"])
