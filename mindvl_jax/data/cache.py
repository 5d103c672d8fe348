"""Decoded samples kept in memory, for data small enough that decoding it once is enough."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from mindvl_jax.data.processor import Example

# A quarter of a usual host's memory would hurt; what does not fit is decoded anew each epoch.
LIMIT_BYTES = 4 << 30


class ExampleCache:
    """Loaded examples by source and record. Phases that encode alike share it, so a new phase starts warm."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES):
        self._limit = limit_bytes
        self._bytes = 0
        self._kept: dict[Hashable, Example] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Example | None:
        return self._kept.get(key)

    def put(self, key: Hashable, example: Example) -> None:
        """Keep an example whose media have been read, while there is room."""
        size = example.nbytes
        with self._lock:
            if key not in self._kept and self._bytes + size <= self._limit:
                self._kept[key] = example.for_cache()
                self._bytes += size

    def __len__(self) -> int:
        return len(self._kept)


_SHARED: dict[Hashable, ExampleCache] = {}


def shared_cache(encoding: Hashable) -> ExampleCache:
    """The cache of one way to encode (model, tokenizer and limits), for the life of the process."""
    return _SHARED.setdefault(encoding, ExampleCache())
