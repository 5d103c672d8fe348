"""The order of samples: a shuffled, weighted, endless mixture with random access (Grain).

The n-th sample of a phase is known from n and the seed alone, so a position in the data is one number, and a resumed
run seeks without replaying.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sources.readers import Source


@dataclasses.dataclass(frozen=True)
class Reference:
    """A sample's place: which source of the mixture and which record of it."""

    source: int
    index: int


class MixtureStream:
    """Endless stream of references.

    Each source is shuffled anew in every epoch and repeated; sources are interleaved at fixed proportions (not drawn by
    chance, so that every stretch of the stream has the mixture's proportions).
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        if not sources:
            raise UserError("the phase's mixture is empty; name at least one source")
        self.sources = tuple(sources)
        self._weights = [float(weight) for weight in weights]
        lengths = [len(source) for source in sources]
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
        seeds = np.random.SeedSequence(seed).generate_state(len(lengths))
        shuffled = [
            grain.MapDataset.range(start, start + length).shuffle(seed=int(own)).repeat()
            for start, length, own in zip(self._starts, lengths, seeds, strict=True)
        ]
        self._mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, list(weights))

    def __getitem__(self, position: int) -> Reference:
        record = int(self._mixed[position])
        source = bisect.bisect_right(self._starts, record) - 1
        return Reference(source, record - self._starts[source])

    @property
    def records(self) -> int:
        """Records of all sources together."""
        return sum(len(source) for source in self.sources)

    def describe(self) -> list[dict[str, Any]]:
        """Return everything besides the seed that determines the sample order, as JSON: a resumed run must find the
        same.
        """
        return [
            {"name": source.name, "records": len(source), "weight": weight, "digest": source.digest}
            for source, weight in zip(self.sources, self._weights, strict=True)
        ]
