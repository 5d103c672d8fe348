"""How many slots decode: all while prompts wait, a half or a quarter once the others have ended and nobody is there to fill them."""

from __future__ import annotations

from collections.abc import Sequence

COMPILATION = 4.0
"""Seconds that a compilation of the decode program takes, about."""
LEAST = 4  # a step of fewer rows takes no less: reading the weights is what it costs


class SlotSizes:
    """Chooses among all slots, a half and a quarter of them.

    Each number is a program of its own. One that is not compiled yet is used only when slots that had ended already have computed for
    as long as its compilation takes: a single call never waits for it, an engine that lives long does so once.

    Args:
      slots: all of them.
      patience: seconds of work in vain before a compilation; 0 compiles at once, for measuring an engine as it is after a while.
    """

    def __init__(self, slots: int, patience: float = COMPILATION):
        self.all, self._patience = slots, patience
        self._smaller = {size: size // 2 for size in (slots, slots // 2) if size % 2 == 0 and size // 2 >= LEAST}
        self._known = {slots}
        self._ran: set[int] = set()
        self._vain = 0.0

    def below(self, size: int) -> int | None:
        """The next smaller number, if it may be used now."""
        smaller = self._smaller.get(size)
        return smaller if smaller in self._known or self._vain >= self._patience else None

    def fitting(self, size: int, active: int) -> int:
        """The smallest number that may be used now and holds `active`; from now on it counts as compiled."""
        while (smaller := self.below(size)) is not None and active <= smaller:
            if smaller not in self._known:
                self._known.add(smaller)
                self._vain = 0.0
            size = smaller
        return size

    def decoded(self, size: int, actives: Sequence[int], seconds: float) -> None:
        """Notes a call that took `seconds` with so many of `size` slots active at each of its steps."""
        if size not in self._ran:  # its compilation is in the seconds
            self._ran.add(size)
        elif size in self._smaller and actives:
            half = sum(active <= self._smaller[size] for active in actives) / len(actives)
            self._vain += half * seconds / 3  # half the rows save about a third of a small model's step
