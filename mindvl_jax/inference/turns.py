"""Who is next among waiting answers: owners by turns, an owner's own answers by priority."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Protocol


class Waiter(Protocol):
    """A waiting answer.

    Attributes:
      prompt: answers of one prompt stay together. owner: whose it is; None is an owner too. priority: lower is earlier.
      arrival: rises with each answer. cost: cache positions that it may take.
    """

    prompt: object
    owner: str | None
    priority: int
    arrival: int
    cost: int


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng 1996) of waiting answers over their owners.

    An owner's answers carry tags that grow by their costs; the lowest tag is next. So owners who wait get equal shares
    of the cache, however many requests each has sent. Who has nothing waiting saves nothing up. Costs are charged when
    an answer starts, so answers that are aborted before cost nothing.
    """

    def __init__(self):
        self._spent: dict[str | None, float] = {}
        self._now = 0.0
        self._plain = True

    def expect(self, waiter: Waiter) -> None:
        """Take note of an answer that joins the line. Until owners or priorities differ, arrival is the order."""
        self._plain = self._plain and waiter.owner is None and not waiter.priority

    def order(self, waiting: Sequence[Waiter]) -> Sequence[Waiter]:
        """The waiting answers, next one first."""
        if self._plain:
            return waiting
        owners = collections.defaultdict(list)
        for waiter in sorted(waiting, key=lambda waiter: (waiter.priority, waiter.arrival)):
            owners[waiter.owner].append(waiter)
        # An owner that newly waits starts at the present, or behind what it had before others. Past ones are forgotten.
        known = {owner: spent for owner, spent in self._spent.items() if owner in owners or spent > self._now}
        self._spent = {**dict.fromkeys(owners, self._now), **known}
        self._now = max(self._now, min((self._spent[owner] for owner in owners), default=self._now))
        tagged = []
        for owner, own in owners.items():
            end, prompt, tag = self._spent[owner], None, 0.0
            for waiter in own:
                if waiter.prompt is not prompt:
                    prompt, tag = waiter.prompt, end
                tagged.append((tag, own[0].arrival, len(tagged), waiter))
                end += waiter.cost
        return [waiter for *_, waiter in sorted(tagged, key=lambda entry: entry[:3])]

    def charge(self, waiter: Waiter) -> None:
        """An answer has started."""
        if not self._plain:
            self._spent[waiter.owner] = self._spent.get(waiter.owner, self._now) + waiter.cost
