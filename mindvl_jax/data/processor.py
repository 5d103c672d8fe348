"""The contracts between a model family and the data pipeline: what a batch holds, and how samples become batches.

The pipeline (loader, planner, workers) and the trainer know these types alone; what a token or a patch is stays with
the family's processor in `models/<family>/processor.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.sample import Sample, SampleError


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a global batch.

    Attributes:
      dtype: name of the numpy dtype.
      dims: name of each dim ("rows", "tokens", ..), which `parallel.rules` maps to mesh axes; None stays whole.
      fill: value of padding.
    """

    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str | None, ...]
    fill: int = 0

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(
                f"a field of shape {self.shape} names {len(self.dims)} dims {self.dims}; expected one name a dim"
            )

    def empty(self) -> np.ndarray:
        return np.full(self.shape, self.fill, self.dtype) if self.fill else np.zeros(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Every array of a global batch by name. Hashable: programs are shared between phases of equal specs.

    Attributes:
      make: builds the batch from its arrays as keyword arguments; the result is a JAX pytree.
      capacities: (field, name in metrics.jsonl) of each array whose filled share is reported; the objective counts,
        under the field's name, what it holds.
    """

    fields: tuple[tuple[str, Field], ...]
    make: Callable[..., Any] = dict
    capacities: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> Field:
        return dict(self.fields)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.fields)

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return next(
            size for _, field in self.fields for size, dim in zip(field.shape, field.dims, strict=True) if dim == "rows"
        )

    def efficiencies(self, counts: Mapping[str, float], micro_steps: int) -> dict[str, float]:
        """Filled share of each array of `capacities` over the micro-steps of a step."""

        def room(field):
            return micro_steps * math.prod(size for size, dim in zip(field.shape, field.dims, strict=True) if dim)

        return {said: counts[name] / room(self[name]) for name, said in self.capacities}

    def describe(self) -> str:
        """`tokens 4x128, patches 4x112x1176`: the shapes of the arrays of `capacities`, or of the largest array."""
        shown = [name for name, _ in self.capacities] or [
            max(self.fields, key=lambda field: math.prod(field[1].shape))[0]
        ]
        return ", ".join(f"{name} {'x'.join(map(str, self[name].shape))}" for name in shown)

    def map(self, function: Callable[[Field], Any]) -> Any:
        """A batch whose entries are `function(field)`: empty arrays, shapes, shardings."""
        return self.make(**{name: function(field) for name, field in self.fields})

    def empty(self) -> Any:
        """A batch of padding, on the host."""
        return self.map(Field.empty)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch with what only the host needs to know about it."""

    batch: Any
    sample_ids: tuple[tuple[str, ...], ...]  # one tuple a row, in segment order

    @property
    def samples(self) -> int:
        return sum(len(row) for row in self.sample_ids)


class Example(Protocol):
    """An encoded sample, a dataclass of the family's own fields beside these.

    Attributes:
      source: index of its source among the phase's (`PhaseConfig.sources`).
      number: its position in the phase's data stream; unique in the phase, the same on every host and after a resume.
      truncated: how many turns (or the like) were left out to fit. shrunk: how many media were made smaller to fit.
      loaded: whether its media have been read. The planner needs none, so they are read after rows are planned.
      nbytes: memory that it takes, for the cache of examples.
    """

    id: str
    source: int
    number: int
    truncated: int
    shrunk: int

    @property
    def loaded(self) -> bool: ...

    @property
    def nbytes(self) -> int: ...

    def for_cache(self) -> Example:
        """The same without what a loaded example needs no more, such as the bytes of image files."""


class Cost(NamedTuple):
    """An example's cost in a row.

    Attributes:
      size: of each budget, in the order of `Processor.budgets`.
      work: multiply-adds in each part of the model, in the order of `Processor.works`; units cancel out.
    """

    size: tuple[int, ...]
    work: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class MediaArea:
    """The array of a batch that decoding processes write into: one row's shape and dtype."""

    shape: tuple[int, ...]
    dtype: str


class Processor(Protocol):
    """Samples to batches for one model family in one phase. Made anew in each decoding process, so making one is cheap.

    Attributes:
      budgets: room of one row. works: names of the parts of the model whose work is evened out between rows.
      encoding: what examples depend on beside the data; phases of equal encodings share cached examples.
      lengths: the same as plain data, with the budgets, for the name of a length index.
      media: what decoding processes fill; None if encoding leaves nothing to read.
    """

    budgets: Budgets
    works: tuple[str, ...]
    encoding: Hashable
    lengths: dict[str, Any]
    media: MediaArea | None

    @staticmethod
    def batch_spec(config: Config, phase: PhaseConfig) -> BatchSpec:
        """The global batch: the rows of one micro-step over all processes. Needs no files."""

    def encode(self, sample: Sample) -> Example:
        """Encode a sample, its media by their headers alone.

        Raises SampleError with the reason when it cannot be used.
        """

    def cost(self, example: Example) -> Cost: ...

    def load(self, example: Example) -> Example:
        """Read the media of an example. Raises SampleError when one does not decode."""

    def media_of(self, example: Example) -> Any:
        """Return the part of an example that `fill` needs, cheap to pickle; falsy if it has no media."""

    def fill(self, area: np.ndarray, media: Sequence[Any]) -> list[SampleError | None]:
        """Read the media of a row's examples into its area, one after another, leaving out failed ones; each example's
        error or None.
        """

    def collate(self, rows: Sequence[Sequence[Example]], *, media: np.ndarray | None = None) -> PackedBatch:
        """The batch of these rows, a part or all of the global batch's.

        Args:
          media: (rows, *media.shape) as `fill` left it; without it the examples are loaded.
        """


MakeProcessor = Callable[[Config, int], Processor]
"""(config, index of the phase) -> its processor. Picklable: decoding processes make their own."""
