"""Records to examples and examples to pixels, in this process. `workers.py` does the same in others."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.packing.collate import size_of, write_pixels
from mindvl_jax.data.example import Example, ExampleEncoder, read_pixels
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.data.sources.mixture import MixtureStream

Planned = tuple[int, Example]  # stream position, example


def encode_record(source: Source, index: int, encoder: ExampleEncoder, budgets: Budgets) -> Example | SampleError:
    """The example, or why there is none: an error with the sample's id."""
    identifier = f"{source.name}:{index}"
    try:
        sample = source[index]
        identifier = sample.id
        example = encoder.encode(sample)
        size, caps = size_of(example), budgets.array()
        if over := [name for name, needed, room in zip(("tokens", "patches", "samples", "images", "windows"), size, caps) if needed > room]:
            raise SampleError("too_long", f"the sample needs more {' and '.join(over)} than a row has: {size} of {tuple(caps.tolist())}")
        return example
    except SampleError as error:
        error.sample_id = error.sample_id or identifier
        return error


class InlineEncoder:
    """Encodes when asked."""

    def __init__(self, stream: MixtureStream, encoder: ExampleEncoder, budgets: Budgets):
        self._stream = stream
        self._encoder = encoder
        self._budgets = budgets

    def encode(self, position: int) -> Example | SampleError:
        reference = self._stream[position]
        return encode_record(self._stream.sources[reference.source], reference.index, self._encoder, self._budgets)

    def encode_many(self, positions: Sequence[int]) -> list[Example | SampleError]:
        return [self.encode(position) for position in positions]

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class DecodedRows:
    """Rows whose pixels have been read.

    Attributes:
      rows: examples of each row, without those that did not decode.
      failures: (stream position, error) of those.
      fresh: (stream position, example) of those whose pixels were read now and are carried by the example.
      patches: (rows, P, patch_dim) uint8 already laid out, or None when the examples carry their pixels.
    """

    rows: list[list[Example]]
    failures: list[tuple[int, SampleError]]
    fresh: list[Planned] = dataclasses.field(default_factory=list)
    patches: np.ndarray | None = None


class InlineDecoder:
    """Reads pixels when asked; `depth` says how many batches are worth having under way."""

    depth = 1

    def __init__(self, vision: PatchGeometry, resample: str):
        self._vision = vision
        self._resample = resample

    def begin(self, rows: Sequence[Sequence[Planned]]) -> Sequence[Sequence[Planned]]:
        return rows

    def finish(self, rows: Sequence[Sequence[Planned]]) -> DecodedRows:
        decoded, failures, fresh = [], [], []
        for row in rows:
            read = []
            for position, example in row:
                if example.pixels is None:
                    try:
                        example = example.with_pixels(self._vision, self._resample)
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


def fill_row(place: np.ndarray, visuals: Sequence[Sequence], vision: PatchGeometry, resample: str) -> list[SampleError | None]:
    """Reads the media of a row's examples into `place` (P, patch_dim), one example after another, leaving out the failed.

    Returns for each example its error or None.
    """
    errors: list[SampleError | None] = []
    cursor = 0
    for items in visuals:
        start = cursor
        try:
            for item in items:
                write_pixels(place[cursor : cursor + item.layout.patches], read_pixels(item, vision, resample), vision)
                cursor += item.layout.patches
            errors.append(None)
        except SampleError as error:
            place[start:cursor] = 0
            cursor = start
            errors.append(error.with_traceback(None))
    return errors
