"""Numbers that a rank's host knows while a program runs: its place in the mesh, and integers as the device wraps them.

The runtime is one (`npu_bridge.runtime.mesh.Runtime`); the compiler makes one for each place to follow what every rank
would do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from npu_bridge.compiler.ir import MeshShape, axis_parts


class HostNumbers:
    """`rt` of a written program, as far as the host's own arithmetic needs it."""

    def __init__(self, mesh: MeshShape, place: int):
        self.mesh, self.sizes, self.place = mesh, mesh.sizes, place
        self.coordinates = self._coordinates(place)

    def _coordinates(self, place: int) -> dict[str, int]:
        return dict(zip(self.sizes, map(int, np.unravel_index(place, tuple(self.sizes.values()) or (1,)))))

    def index(self, axes: Sequence[str], place: int | None = None) -> int:
        """Return the index of this device's shard of a dimension sharded over `axes` (major first)."""
        where = self.coordinates if place is None else self._coordinates(place)
        number = 0
        for reference in axes:
            name, before, size = axis_parts(reference, self.sizes)
            after = self.sizes[name] // (before * size)
            number = number * size + (where[name] // after) % size
        return number

    def groups(self, axes: tuple[str, ...]) -> list[list[int]]:
        """Places of every group along `axes`, each in the order of the shards."""
        rows: dict[tuple, dict[int, int]] = {}
        for place in range(self.mesh.count):
            rest = []
            for name, at in self._coordinates(place).items():
                mine = sorted(
                    (axis_parts(a, self.sizes) for a in axes if a.partition(":")[0] == name), key=lambda p: p[1]
                )
                # the digits of this coordinate without those of the group's (sub-)axes
                digits, total = [], self.sizes[name]
                taken = {(b, s) for _, b, s in mine}
                edges = sorted({1, total, *(b for b, _ in taken), *(b * s for b, s in taken)})
                for low, high in itertools.pairwise(edges):
                    if not any(b <= low and high <= b * s for b, s in taken):
                        digits.append((at // (total // high)) % (high // low))
                rest.append(tuple(digits))
            rows.setdefault(tuple(rest), {})[self.index(axes, place)] = place
        return [[row[i] for i in sorted(row)] for row in rows.values()]

    @staticmethod
    def wrap(x: int, bits: int, unsigned: bool) -> int:
        """Wrap `x` to an integer of `bits`."""
        x &= (1 << bits) - 1
        return x if unsigned or x < 1 << (bits - 1) else x - (1 << bits)

    @staticmethod
    def replaced(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
        """Return a flat host table with one element replaced."""
        return (*values[:at], value, *values[at + 1 :])

    @staticmethod
    def int_quotient(x: int, y: int) -> int:
        """Round to zero as StableHLO does; Python rounds down."""
        if y == 0:
            return -1
        if abs(x) < 1 << 52:
            return math.trunc(x / y)
        return (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)

    @staticmethod
    def int_remainder(x: int, y: int) -> int:
        """Has the sign of `x`, as in StableHLO; Python takes that of `y`."""
        return x if y == 0 else int(math.fmod(x, y))
