"""Lengths of all samples of a source, kept on disk: with them every host plans rows without encoding the other hosts' samples.

Planning needs of a sample its tokens, its patches, its picture and window counts, and the patches of each picture; or why it is
refused. `mindvl data index` writes that once; a run with `data.length_index` then encodes its own rows alone. Plans are the same
as without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.config.schema import Config
from mindvl_jax.data.example import EncodeLimits, Example
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.data.sources.mixture import MixtureStream
from mindvl_jax.core.errors import UserError

FORMAT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What the planner reads of an `Example`, without the example."""

    id: str
    length: int
    patches: int
    image_lengths: np.ndarray
    window_lengths: range  # their number is all that counts
    truncated: int
    shrunk: int
    source: int = 0
    pixels: None = None

    def matches(self, example: Example) -> bool:
        return (self.length, self.patches, len(self.window_lengths)) == (example.length, example.patches, len(example.window_lengths)) and np.array_equal(
            self.image_lengths, example.image_lengths
        )


def encoding_of(config: Config, limits: EncodeLimits, budgets: Budgets) -> dict[str, Any]:
    """What lengths depend on beside the data, JSON-able."""
    model = config.model.model_dump(mode="json", exclude={"compute_dtype", "param_dtype", "remat"})
    return {"format": FORMAT, "model": model, "tokenizer": config.tokenizer.model_dump(mode="json"), "limits": dataclasses.asdict(limits), "budgets": dataclasses.asdict(budgets)}


def index_path(folder: str | Path, source: Source, encoding: dict[str, Any]) -> Path:
    """File of a source's lengths. Its name changes with the records, their files and everything that encoding depends on."""
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in source.paths]
    said = json.dumps([source.identity, files, encoding], sort_keys=True)
    return Path(folder) / f"{source.name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"


def write_index(path: Path, outcomes: Iterable[Example | SampleError]) -> tuple[int, int]:
    """Writes the lengths of a source's samples in order; returns how many were kept and refused. The file appears whole or not at all."""
    numbers, images, refused, ids = [], [], [], []
    for outcome in outcomes:
        if isinstance(outcome, SampleError):
            refused.append({"index": len(numbers), "id": str(outcome.sample_id), "reason": outcome.reason, "message": str(outcome)})
            numbers.append((-1, 0, 0, 0, 0, 0))
            ids.append("")
        else:
            numbers.append((outcome.length, outcome.patches, len(outcome.image_lengths), len(outcome.window_lengths), outcome.truncated, outcome.shrunk))
            images.append(outcome.image_lengths)
            ids.append(outcome.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        np.savez(
            file, numbers=np.array(numbers, np.int32).reshape(-1, 6), images=np.concatenate([*images, np.zeros(0, np.int32)]).astype(np.int32),
            text=np.frombuffer(json.dumps({"ids": ids, "refused": refused}).encode(), np.uint8),
        )  # fmt: skip
    os.replace(unfinished, path)
    return len(numbers) - len(refused), len(refused)


class LengthIndex:
    """The lengths of one source."""

    def __init__(self, path: Path, source: Source):
        """Raises UserError when there is no index of this data and these settings, or it cannot be read."""
        if not path.is_file():
            old = sorted(other.name for other in path.parent.glob(f"{source.name}-*.npz")) if path.parent.is_dir() else []
            found = f"; {', '.join(old)} is of other data or other settings" if old else ""
            raise UserError(f"data.length_index: {path} does not exist{found}. Write it with `mindvl data index --config FILE`, or unset data.length_index")
        try:
            with np.load(path, allow_pickle=False) as stored:
                self._numbers, self._images = stored["numbers"], stored["images"]
                text = json.loads(stored["text"].tobytes())
        except Exception as error:  # a damaged archive raises anything from BadZipFile to ValueError
            raise UserError(f"data.length_index: {path} cannot be read ({type(error).__name__}: {error}); delete it and write it again with `mindvl data index`") from None
        if len(self._numbers) != len(source):
            raise UserError(f"data.length_index: {path} holds {len(self._numbers)} samples, the source has {len(source)}; delete it and write it again")
        self._ids = text["ids"]
        self._refused = {entry["index"]: entry for entry in text["refused"]}
        self._ends = np.cumsum(self._numbers[:, 2])

    def __getitem__(self, index: int) -> Measured | SampleError:
        if index in self._refused:
            entry = self._refused[index]
            return SampleError(entry["reason"], entry["message"], entry["id"])
        length, patches, images, windows, truncated, shrunk = self._numbers[index].tolist()
        end = int(self._ends[index])
        return Measured(self._ids[index], length, patches, self._images[end - images : end], range(windows), truncated, shrunk)


class IndexedEncoder:
    """The planner's source of lengths: nothing is read but the index. `own` encodes what this process will decode."""

    def __init__(self, stream: MixtureStream, indices: list[LengthIndex], encoder: Any):
        self._stream, self._indices, self._encoder = stream, indices, encoder

    def encode(self, position: int) -> Measured | SampleError:
        reference = self._stream[position]
        return self._indices[reference.source][reference.index]

    def own(self, rows: list[list[tuple[int, Any]]]) -> tuple[list[list[tuple[int, Example]]], list[tuple[int, SampleError]]]:
        """Rows with examples in place of lengths, and those that cannot be encoded any more (they leave a gap in their row).

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
                    if not example.matches(outcome):
                        reference = self._stream[position]
                        where = self._stream.sources[reference.source].where(reference.index)
                        raise UserError(f"sample {outcome.id!r} ({where}) has other lengths than data.length_index says: its media were changed after `mindvl data index`; write the index again")
                    example = dataclasses.replace(outcome, source=example.source)
                complete[-1].append((position, example))
        return complete, lost

    def close(self) -> None:
        self._encoder.close()


def index_phase(config: Config, names: Iterable[str], limits: EncodeLimits, budgets: Budgets, outcomes_of: Callable[[Source], Iterable[Example | SampleError]]) -> list[tuple[str, Path, int, int]]:
    """Writes the missing indices of a phase's sources; returns (source, file, kept, refused) of each, -1 where one was there."""
    from mindvl_jax.data.sources.readers import open_sources

    done = []
    encoding = encoding_of(config, limits, budgets)
    for source in open_sources(config.data.sources, list(names)):
        path = index_path(config.data.length_index, source, encoding)
        done.append((source.name, path, -1, -1) if path.is_file() else (source.name, path, *write_index(path, outcomes_of(source))))
    return done
