"""Records to examples, and examples to loaded ones, in this process. `workers.py` does the same in others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mindvl_jax.data.processor import Example, Processor
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.mixture import MixtureStream
from mindvl_jax.data.sources.readers import Source

Planned = tuple[int, Example]  # stream position, example


def encode_record(source: Source, index: int, processor: Processor) -> Example | SampleError:
    """The example, or why there is none: an error with the sample's id."""
    identifier = f"{source.name}:{index}"
    try:
        sample = source[index]
        identifier = sample.id
        example = processor.encode(sample)
        budgets, size = processor.budgets, processor.cost(example).size
        if over := [
            name for name, needed, room in zip(budgets.names, size, budgets.capacities, strict=True) if needed > room
        ]:
            raise SampleError(
                "too_long", f"the sample needs more {' and '.join(over)} than a row has: {size} of {budgets.capacities}"
            )
        return example
    except SampleError as error:
        error.sample_id = error.sample_id or identifier
        return error


class InlineEncoder:
    """Encode when asked."""

    def __init__(self, stream: MixtureStream, processor: Processor):
        self._stream, self._processor = stream, processor

    def encode(self, position: int) -> Example | SampleError:
        reference = self._stream[position]
        return encode_record(self._stream.sources[reference.source], reference.index, self._processor)

    def encode_many(self, positions: Sequence[int]) -> list[Example | SampleError]:
        return [self.encode(position) for position in positions]

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class DecodedRows:
    """Rows whose media have been read.

    Attributes:
      rows: examples of each row, without those that did not decode.
      failures: (stream position, error) of those.
      fresh: (stream position, example) of those that were loaded now.
      media: (rows, *MediaArea.shape) already filled, or None if the examples are loaded.
    """

    rows: list[list[Example]]
    failures: list[tuple[int, SampleError]]
    fresh: list[Planned] = dataclasses.field(default_factory=list)
    media: np.ndarray | None = None


class InlineDecoder:
    """Load examples when asked; `depth` says how many batches are worth having under way."""

    depth = 1

    def __init__(self, processor: Processor):
        self._processor = processor

    def begin(self, rows: Sequence[Sequence[Planned]]) -> Sequence[Sequence[Planned]]:
        return rows

    def finish(self, rows: Sequence[Sequence[Planned]]) -> DecodedRows:
        decoded, failures, fresh = [], [], []
        for row in rows:
            read = []
            for position, example in row:
                if not example.loaded:
                    try:
                        example = self._processor.load(example)
                    except SampleError as error:
                        error.sample_id = example.id
                        failures.append((position, error))
                        continue
                    fresh.append((position, example))
                read.append(example)
            decoded.append(read)
        return DecodedRows(decoded, failures, fresh)

    def close(self) -> None:
        pass
