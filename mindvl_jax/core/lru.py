"""A mapping that holds a number of bytes."""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteLimitedLRU(Generic[Key, Value]):
    """Keep values up to a number of bytes; evict the least recently used.

    Attributes:
      limit, held: bytes.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._entries: collections.OrderedDict[Key, tuple[Value, int]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Value:
        """Return a value, which becomes the most recently used. Raises KeyError."""
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def items(self) -> list[tuple[Key, Value]]:
        """List keys and values, without using any."""
        return [(key, value) for key, (value, _) in self._entries.items()]

    def add(self, key: Key, value: Value, nbytes: int) -> None:
        """Keep a value unless its key is there. A value larger than the limit is not kept."""
        if nbytes > self.limit or key in self._entries:
            return
        self._entries[key] = value, nbytes
        self.held += nbytes
        while self.held > self.limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self.held -= freed

    def clear(self) -> None:
        self._entries.clear()
        self.held = 0
