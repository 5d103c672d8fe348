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

from mindvl_jax.core.lru import ByteLimitedLRU

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
    """Keep entries up to a number of bytes, and find the one that a prompt begins with.

    Attributes:
      version: changes with the entries; what `longest` found holds for one version.
    """

    def __init__(self, limit: int):
        self.version = 0
        self._entries: ByteLimitedLRU[int, Entry] = ByteLimitedLRU(limit)
        self._met: collections.deque[np.ndarray] = collections.deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held(self) -> int:
        """Bytes of all entries."""
        return self._entries.held

    def longest(self, identity: np.ndarray) -> tuple[Entry, int] | None:
        """(entry, tokens in common) of the longest common beginning, never the whole prompt: its last token must be
        read for what follows it.
        """
        found = {number: common(entry.identity, identity) for number, entry in self._entries.items()}
        best = max(found, key=found.__getitem__, default=None)
        if best is None or min(found[best], len(identity) - 1) < SHORTEST:
            return None
        return self._entries.get(best), min(found[best], len(identity) - 1)

    def wants(self, identity: np.ndarray) -> bool:
        """Whether to keep a prompt that is read now. Remembers its identity, to know its beginning the next time."""
        if any(common(entry.identity, identity) == len(identity) for _, entry in self._entries.items()):
            return False
        again = any(common(met, identity) >= SHORTEST for met in self._met)
        self._met.append(identity)
        return len(identity) >= KEPT_AT_ONCE or again

    def add(self, entry: Entry) -> None:
        """Keep an entry. One larger than the limit is not kept."""
        self.version += 1
        self._entries.add(self.version, entry, entry.nbytes)

    def clear(self) -> None:
        self.version += 1
        self._entries.clear()
        self._met.clear()
