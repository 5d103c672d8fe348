"""Keys and values of prompts that were read, for prompts that begin in the same way.

Two prompts begin alike as far as their identities do (`prompts.Prompt.identity`). Rotary positions follow from the same
content, and those of the rest come from the whole prompt, so M-RoPE needs no offset of its own.

One cache belongs to one engine, with its weights and its adapter; new weights empty it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import numpy as np

SHORTEST = 64
"""Fewest tokens in common that are worth the program of their own."""
KEPT_AT_ONCE = 256
"""Prompts from this length on are kept when they are read first; shorter ones when their beginning is met again."""
REMEMBERED = 256
"""Identities of shorter prompts that are remembered."""


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A prompt that was read.

    Attributes:
      identity: (n,) int64. keys, values: (L, 1, S, ..) on the device; the prompt's tokens are the last n places.
    """

    identity: np.ndarray
    keys: Any
    values: Any

    @property
    def tokens(self) -> int:
        return len(self.identity)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in (self.keys, self.values))


def common(one: np.ndarray, two: np.ndarray) -> int:
    """Tokens at the beginning that are equal."""
    length = min(len(one), len(two))
    differ = np.flatnonzero(one[:length] != two[:length])
    return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Entries up to a number of bytes; the one that was not used for longest goes first."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: collections.OrderedDict[int, Entry] = collections.OrderedDict()
        self._met: collections.deque[np.ndarray] = collections.deque(maxlen=REMEMBERED)
        self._number = 0
        self.held = 0

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, identity: np.ndarray) -> tuple[Entry, int] | None:
        """(entry, tokens in common) of the longest common beginning, never the whole prompt: its last token must be
        read for what follows it.
        """
        found = {number: common(entry.identity, identity) for number, entry in self._entries.items()}
        best = max(found, key=found.__getitem__, default=None)
        if best is None or min(found[best], len(identity) - 1) < SHORTEST:
            return None
        self._entries.move_to_end(best)
        return self._entries[best], min(found[best], len(identity) - 1)

    def wants(self, identity: np.ndarray) -> bool:
        """Whether a prompt that is read now shall be kept."""
        if any(common(entry.identity, identity) == len(identity) for entry in self._entries.values()):
            return False
        again = any(common(met, identity) >= SHORTEST for met in self._met)
        self._met.append(identity)
        return len(identity) >= KEPT_AT_ONCE or again

    def add(self, entry: Entry) -> None:
        """Keep an entry, and let others go where the limit wants it. One larger than the limit is not kept."""
        if entry.nbytes > self.limit:
            return
        self._entries[self._number], self._number = entry, self._number + 1
        self.held += entry.nbytes
        while self.held > self.limit:
            _, gone = self._entries.popitem(last=False)
            self.held -= gone.nbytes

    def clear(self) -> None:
        self._entries.clear()
        self._met.clear()
        self.held = 0
