"""Stream of samples to planned rows of the global batch. Every process plans the same rows.

Plans depend on lengths alone; no medium is decoded here. What is waiting is remembered by stream positions, so the
state is a few numbers a waiting sample, and a resumed run encodes those again and goes on with the same rows.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from typing import Any, Protocol

import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.cache import ExampleCache
from mindvl_jax.data.packing.lengths import Measured
from mindvl_jax.data.packing.rows import plan_rows
from mindvl_jax.data.processor import Cost, Example, Processor
from mindvl_jax.data.quarantine import Quarantine
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.mixture import MixtureStream, Reference

# Waiting samples hold at least this many batches' worth of a filled budget, so that rows have a choice.
AHEAD = 2.0


class RecordEncoder(Protocol):
    """Interface of the encoders `encoding.InlineEncoder` and `workers.PoolEncoder`."""

    def encode(self, position: int) -> Example | SampleError: ...

    def close(self) -> None: ...


class Planner:
    """Draw samples ahead, refuse bad ones, and pack rows."""

    def __init__(
        self,
        stream: MixtureStream,
        encoder: RecordEncoder,
        processor: Processor,
        *,
        rows: int,
        buffer: int,
        quarantine: Quarantine,
        cache: ExampleCache | None,
    ):
        self._stream = stream
        self._encoder = encoder
        self._processor = processor
        self._budgets = processor.budgets
        self._caps = self._budgets.array()
        self._filling = range(len(self._budgets.filled))
        self._rows = rows
        self._buffer = buffer
        self._quarantine = quarantine
        self._cache = cache
        self._position = 0
        self._waiting: list[tuple[int, Example]] = []
        self._sizes: list[tuple[int, ...]] = []
        self._loads: list[tuple[float, ...]] = []
        self._totals = np.zeros(len(self._caps), np.int64)
        self._drawn = collections.Counter()
        self._fingerprint = 0
        self.batches = 0
        self.samples = 0
        self.truncated = 0
        self.shrunk = 0
        self._filled = np.zeros(len(self._caps), np.int64)
        self.last_efficiency = (0.0,) * len(self._filling)
        self.last_imbalance = (1.0,) * len(processor.works)

    # --- planning ---

    def next_rows(self) -> list[list[tuple[int, Example]]]:
        """(stream position, example) of each row of the next global batch, without media unless they were cached."""
        self._draw()
        sizes, loads = np.array(self._sizes, np.int64), np.array(self._loads)
        rows = plan_rows(sizes, loads, self._budgets, self._rows)
        planned = [[self._waiting[index] for index in row] for row in rows]
        used = [index for row in rows for index in row]
        taken = sizes[used].sum(0)
        row_loads = np.array([loads[row].sum(0) for row in rows])
        self.last_imbalance = tuple((row_loads.max(0) / np.maximum(row_loads.mean(0), 1e-9)).tolist())
        self.last_efficiency = tuple((taken / (self._caps * self._rows))[: len(self._filling)].tolist())
        self._filled += taken
        self._totals -= taken
        gone = set(used)
        keep = [index for index in range(len(self._waiting)) if index not in gone]
        self._waiting = [self._waiting[index] for index in keep]
        self._sizes = [self._sizes[index] for index in keep]
        self._loads = [self._loads[index] for index in keep]
        self.batches += 1
        self.samples += len(used)
        self.truncated += sum(example.truncated > 0 for row in planned for _, example in row)
        self.shrunk += sum(example.shrunk > 0 for row in planned for _, example in row)
        positions = np.array([position for row in planned for position, _ in [*row, (-1, None)]], np.int64)
        self._fingerprint = zlib.crc32(positions.tobytes(), self._fingerprint)
        return planned

    def _draw(self) -> None:
        enough = AHEAD * self._rows * self._caps
        while len(self._waiting) < self._buffer or all(
            self._totals[budget] < enough[budget] for budget in self._filling
        ):
            position = self._position
            self._position += 1
            example = self._example(position)
            if example is not None:
                self._add(position, example)

    def _add(self, position: int, example: Example) -> None:
        cost: Cost = example.cost if isinstance(example, Measured) else self._processor.cost(example)
        self._waiting.append((position, example))
        self._sizes.append(cost.size)
        self._loads.append(cost.work)
        self._totals += cost.size

    def _example(self, position: int) -> Example | None:
        reference = self._stream[position]
        self._drawn[reference.source] += 1
        source = self._stream.sources[reference.source]
        if self._cache is not None and (known := self._cache.get(self._key(reference))) is not None:
            self._quarantine.encoded()
            return dataclasses.replace(
                known, source=reference.source, number=position
            )  # the same record may serve another phase's mixture
        example = self._encoder.encode(position)
        if isinstance(example, SampleError):
            self._quarantine.refuse(id=str(example.sample_id), where=source.where(reference.index), error=example)
            return None
        self._quarantine.encoded()
        return dataclasses.replace(example, source=reference.source, number=position)

    def remember(self, position: int, example: Example) -> None:
        """Keep a decoded example for later epochs (when caching is on)."""
        if self._cache is not None:
            self._cache.put(self._key(self._stream[position]), example)

    def _key(self, reference: Reference) -> tuple[str, int]:
        return self._stream.sources[reference.source].identity, reference.index

    def where(self, position: int) -> str:
        reference = self._stream[position]
        return self._stream.sources[reference.source].where(reference.index)

    # --- state ---

    def epochs(self) -> list[float]:
        """Return the share of each source that has been used: packed, or refused for good.

        Samples that wait for a row do not count.
        """
        waiting = collections.Counter(example.source for _, example in self._waiting)
        return [
            (self._drawn[index] - waiting[index]) / len(source) for index, source in enumerate(self._stream.sources)
        ]

    def counters(self) -> dict[str, Any]:
        """Count up to the last planned batch."""
        capacity = np.maximum(self._caps * self._rows * max(self.batches, 1), 1)
        epochs = {
            source.name: round(share, 4) for source, share in zip(self._stream.sources, self.epochs(), strict=True)
        }
        return {
            "batches": self.batches,
            "samples": self.samples,
            "epochs": min(epochs.values()),
            "epochs_by_source": epochs,
            "waiting": len(self._waiting),
            "truncated": self.truncated,
            "shrunk": self.shrunk,
            **{
                f"{name}_efficiency": float(self._filled[budget] / capacity[budget])
                for budget, name in enumerate(self._budgets.filled)
            },
            **{
                f"batch_{name}_efficiency": value
                for name, value in zip(self._budgets.filled, self.last_efficiency, strict=True)
            },
            **{
                f"{name}_imbalance": value
                for name, value in zip(self._processor.works, self.last_imbalance, strict=True)
            },
            # Equal on all processes, or they do not see the same data (a file that one host lacks, say).
            "plan_fingerprint": self._fingerprint,
        }

    def state(self) -> dict[str, Any]:
        """JSON-able state after the last planned batch. It does not depend on how many processes there are."""
        return {
            "position": self._position,
            "waiting": [position for position, _ in self._waiting],
            "records": self._stream.describe(),
            "drawn": [self._drawn[index] for index in range(len(self._stream.sources))],
            "batches": self.batches,
            "samples": self.samples,
            "truncated": self.truncated,
            "shrunk": self.shrunk,
            "filled": self._filled.tolist(),
            "efficiency": list(self.last_efficiency),
            "imbalance": list(self.last_imbalance),
            "fingerprint": self._fingerprint,
            "quarantine": self._quarantine.state("encode"),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after `state`. Raises UserError when the data is not the same any more."""
        if state["records"] != self._stream.describe():
            raise UserError(
                "the data has changed since the checkpoint: "
                f"{_difference(state['records'], self._stream.describe())}. Its order would be another one. "
                "Put the files and the mixture back, or set run.resume to `never` and start from the weights "
                "with run.init_from"
            )
        self._position = int(state["position"])
        self._waiting, self._sizes, self._loads = [], [], []
        self._totals[:] = 0
        for position in state["waiting"]:
            example = self._example(int(position))
            if example is None:
                raise UserError(
                    "a sample that was waiting to be packed cannot be read any more "
                    f"({self.where(position)}); see the quarantine file for the reason, and put the file back"
                )
            self._add(int(position), example)
        # After the waiting samples were drawn again: those were counted the first time.
        self._drawn = collections.Counter(dict(enumerate(state["drawn"])))
        self.batches, self.samples, self.truncated = state["batches"], state["samples"], state["truncated"]
        self.shrunk = state.get("shrunk", 0)  # checkpoints from before it was counted lack it
        self._filled = np.array(state["filled"], np.int64)
        self.last_efficiency, self.last_imbalance = tuple(state["efficiency"]), tuple(state["imbalance"])
        self._fingerprint = state["fingerprint"]
        self._quarantine.restore("encode", state["quarantine"])


def _difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Describe the differences between two mixtures."""

    def names(sources):
        return [source["name"] for source in sources]

    if names(before) != names(now):
        return f"it mixed {', '.join(names(before))}, now {', '.join(names(now))}"
    told = []
    for old, new in zip(before, now, strict=True):
        if old["records"] != new["records"]:
            told.append(f"{old['name']} had {old['records']} records, now {new['records']}")
        elif old["digest"] != new["digest"]:
            told.append(f"{old['name']} has the same number of records with another content or in another order")
        if old["weight"] != new["weight"]:
            told.append(f"the weight of {old['name']} was {old['weight']:g}, now {new['weight']:g}")
    return "; ".join(told)
