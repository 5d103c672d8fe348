"""Costs of all samples of a source, kept on disk: with them every host plans rows without encoding the other hosts'
samples.

Planning needs of a sample what it takes of each budget and its work; or why it is refused. `mindvl data index` writes
that once; a run with `data.length_index` then encodes its own rows alone. Plans are the same as without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import replacing
from mindvl_jax.data import remote
from mindvl_jax.data.encoding import encode_record
from mindvl_jax.data.processor import Cost, Example, Processor
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.mixture import MixtureStream
from mindvl_jax.data.sources.readers import Source, open_sources

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sizes of an example, for the planner."""

    id: str
    cost: Cost
    truncated: int
    shrunk: int
    source: int = 0
    number: int = 0
    loaded: bool = False


def index_path(folder: str | Path, source: Source, encoding: dict[str, Any]) -> Path:
    """File of a source's lengths.

    Its name changes with the records, their files and everything that encoding depends on.
    """
    files = [_version(path) for path in source.paths]
    said = json.dumps([FORMAT, source.identity, files, encoding], sort_keys=True)
    return Path(folder) / f"{source.name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"


def _version(path: str) -> list[Any]:
    """Tell this content of a file from a later one."""
    if remote.is_remote(path):
        return [remote.version(path)]
    found = os.stat(path)
    return [path, found.st_size, found.st_mtime_ns]


def write_index(path: Path, outcomes: Iterable[Example | SampleError], processor: Processor) -> tuple[int, int]:
    """Write the costs of a source's samples in order; returns how many were kept and refused.

    The file appears whole or not at all.
    """
    costs, counts, refused, ids = [], [], [], []
    nothing = Cost((-1,) * len(processor.budgets.names), (0.0,) * len(processor.works))
    for outcome in outcomes:
        if isinstance(outcome, SampleError):
            refused.append(
                {"index": len(costs), "id": str(outcome.sample_id), "reason": outcome.reason, "message": str(outcome)}
            )
            costs.append(nothing)
            counts.append((0, 0))
            ids.append("")
        else:
            costs.append(processor.cost(outcome))
            counts.append((outcome.truncated, outcome.shrunk))
            ids.append(outcome.id)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            sizes=np.array([cost.size for cost in costs], np.int32).reshape(-1, len(nothing.size)),
            works=np.array([cost.work for cost in costs], np.float64).reshape(-1, len(nothing.work)),
            counts=np.array(counts, np.int32).reshape(-1, 2),
            text=np.frombuffer(json.dumps({"ids": ids, "refused": refused}).encode(), np.uint8),
        )
    return len(costs) - len(refused), len(refused)


class LengthIndex:
    """The lengths of one source."""

    def __init__(self, path: Path, source: Source):
        """Raise UserError when there is no index of this data and these settings, or it cannot be read."""
        if not path.is_file():
            old = (
                sorted(other.name for other in path.parent.glob(f"{source.name}-*.npz")) if path.parent.is_dir() else []
            )
            found = f"; {', '.join(old)} is of other data or other settings" if old else ""
            raise UserError(
                f"data.length_index: {path} does not exist{found}. Write it with `mindvl data index --config "
                "FILE`, or unset data.length_index"
            )
        try:
            with np.load(path, allow_pickle=False) as stored:
                self._sizes, self._works, self._counts = (
                    stored["sizes"].tolist(),
                    stored["works"].tolist(),
                    stored["counts"].tolist(),
                )
                text = json.loads(stored["text"].tobytes())
        except Exception as error:  # a damaged archive raises anything from BadZipFile to ValueError
            raise UserError(
                f"data.length_index: {path} cannot be read ({type(error).__name__}: {error}); delete it and "
                "write it again with `mindvl data index`"
            ) from None
        if len(self._sizes) != len(source):
            raise UserError(
                f"data.length_index: {path} holds {len(self._sizes)} samples, the source has {len(source)}; "
                "delete it and write it again"
            )
        self._ids = text["ids"]
        self._refused = {entry["index"]: entry for entry in text["refused"]}

    def __getitem__(self, index: int) -> Measured | SampleError:
        if index in self._refused:
            entry = self._refused[index]
            return SampleError(entry["reason"], entry["message"], entry["id"])
        return Measured(
            self._ids[index], Cost(tuple(self._sizes[index]), tuple(self._works[index])), *self._counts[index]
        )


class IndexedEncoder:
    """The planner's source of costs: nothing is read but the index. `own` encodes what this process will decode."""

    def __init__(self, stream: MixtureStream, indices: list[LengthIndex], encoder: Any, processor: Processor):
        self._stream, self._indices, self._encoder, self._processor = stream, indices, encoder, processor

    def encode(self, position: int) -> Measured | SampleError:
        reference = self._stream[position]
        return self._indices[reference.source][reference.index]

    def own(
        self, rows: list[list[tuple[int, Any]]]
    ) -> tuple[list[list[tuple[int, Example]]], list[tuple[int, SampleError]]]:
        """Rows with examples in place of lengths, and those that cannot be encoded any more (they leave a gap in their
        row).

        Raises UserError when a sample is not as long as the index says: its media were changed.
        """
        wanted = [position for row in rows for position, example in row if isinstance(example, Measured)]
        found = dict(zip(wanted, self._encoder.encode_many(wanted), strict=True))
        complete, lost = [], []
        for row in rows:
            complete.append([])
            for position, example in row:
                if isinstance(example, Measured):
                    outcome = found[position]
                    if isinstance(outcome, SampleError):
                        lost.append((position, outcome))
                        continue
                    if example.cost != self._processor.cost(outcome):
                        reference = self._stream[position]
                        where = self._stream.sources[reference.source].where(reference.index)
                        raise UserError(
                            f"sample {outcome.id!r} ({where}) has other lengths than data.length_index says: "
                            "its media were changed after `mindvl data index`; write the index again"
                        )
                    example = dataclasses.replace(outcome, source=example.source, number=position)
                complete[-1].append((position, example))
        return complete, lost

    def close(self) -> None:
        self._encoder.close()


def index_phase(config: Config, names: Iterable[str], processor: Processor) -> list[tuple[str, Path, int, int]]:
    """Write the missing indices of a phase's sources; returns (source, file, kept, refused) of each, -1 where one was
    there.
    """
    done = []
    for source in open_sources(config.data.sources, list(names)):
        path = index_path(config.data.length_index, source, processor.lengths)
        if path.is_file():
            done.append((source.name, path, -1, -1))
        else:
            outcomes = (encode_record(source, index, processor) for index in range(len(source)))
            done.append((source.name, path, *write_index(path, outcomes, processor)))
    return done
