"""What the vision tower gave for images and videos, so that one which comes again is not seen again.

One cache belongs to one engine, with its weights and its adapter; new weights empty it.
"""

from __future__ import annotations

import collections

import numpy as np


class PictureCache:
    """Visual tokens (G, D) on the host by digest of the pixels, up to a number of bytes; the one that was not used for
    longest goes first.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._entries: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def get(self, digest: bytes) -> np.ndarray:
        """Raises KeyError where it is not held."""
        self._entries.move_to_end(digest)
        return self._entries[digest]

    def add(self, digest: bytes, visual_GD: np.ndarray) -> None:
        """Keep a medium, and let others go where the limit wants it. One larger than the limit is not kept."""
        if visual_GD.nbytes > self.limit or digest in self._entries:
            return
        self._entries[digest] = visual_GD
        self.held += visual_GD.nbytes
        while self.held > self.limit:
            _, gone = self._entries.popitem(last=False)
            self.held -= gone.nbytes

    def clear(self) -> None:
        self._entries.clear()
        self.held = 0
