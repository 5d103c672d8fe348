"""Batches on their way to the devices: one micro-step is always placed ahead of the one that runs."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.processor import BatchSpec, PackedBatch
from mindvl_jax.parallel.rules import batch_sharding

KEPT_BYTES = 512 << 20
"""Largest batch of an optimizer step that stays on the host until its loss is known."""


class Loader(Protocol):
    """Interface of a loader for training (see `mindvl_jax.data`)."""

    counters: dict[str, Any]

    def __iter__(self) -> Iterator[PackedBatch]: ...
    def __next__(self) -> PackedBatch: ...
    def state(self) -> dict: ...
    def restore(self, state: dict) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-step's rows on the devices.

    Attributes:
      sample_ids: of this process's rows.
      loader_state: the loader's state right after this batch; only at the last micro-step of an optimizer step, else
        None.
      counters: the loader's counters right after this batch.
      host: the batch as the loader gave it; None when it is only a part of the rows, or large.
    """

    batch: Any
    sample_ids: tuple[str, ...]
    loader_state: dict | None
    counters: dict[str, Any]
    host: Any = None


class Feed:
    """Pulls from a loader and places rows on the mesh, `ahead` micro-steps early; transfers run beside the computation.

    Args:
      spec: of the loader's batches; says how each array is spread over the mesh.
      micro_steps: how many more to pull at all: the loader is never asked for a batch that no step takes.
      accumulation: micro-steps of one optimizer step.
    """

    def __init__(
        self, loader: Loader, mesh: Mesh, spec: BatchSpec, *, micro_steps: int, accumulation: int, ahead: int = 1
    ):
        self._loader = loader
        self._shardings = spec.map(lambda field: batch_sharding(field.dims, field.shape, mesh))
        # Of the steps in flight the batches stay on the host too: should one turn out bad, it is written down.
        size = sum(math.prod(field.shape) * np.dtype(field.dtype).itemsize for _, field in spec.fields)
        self._keep = jax.process_count() == 1 and size * accumulation <= KEPT_BYTES
        self._micro_steps = micro_steps
        self._accumulation = accumulation
        self._pulled = 0
        self._queue: collections.deque[MicroBatch] = collections.deque()
        self._ahead = ahead

    def next(self) -> MicroBatch:
        """The next micro-step's batch.

        Call `refill` after its program is dispatched, so that the wait for data overlaps with it.
        """
        if not self._queue:
            self._pull()
        return self._queue.popleft()

    def refill(self) -> None:
        while len(self._queue) < self._ahead and self._pulled < self._micro_steps:
            self._pull()

    def _pull(self) -> None:
        try:
            packed = next(self._loader)
        except StopIteration:
            raise UserError(
                f"the data ran out after {self._pulled} of {self._micro_steps} micro-steps; the mixture's "
                "sources give no further batch"
            ) from None
        self._pulled += 1
        border = self._pulled % self._accumulation == 0
        batch = place(packed.batch, self._shardings)
        ids = tuple(sample for row in packed.sample_ids for sample in row)
        state = self._loader.state() if border else None
        host = packed.batch if self._keep else None
        self._queue.append(MicroBatch(batch, ids, state, dict(self._loader.counters), host))


def place(batch: Any, shardings: Any) -> Any:
    """A host batch on the mesh; with several processes each gives its own rows."""
    if jax.process_count() > 1:
        return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)
    return jax.device_put(batch, shardings)
