"""A folder of safetensors files: what is in it, checked before anything is read.

The library reads and validates each file; this module adds the folder: index, spelling of names, hostile paths,
pickles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mindvl_jax.models.hf import HFMapping
from mindvl_jax.weights.errors import WeightsError, listed, read_json
from mindvl_jax.weights.stored_names import INDEX, SINGLE

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor on disk.

    Attributes:
      stored: its name in the file; `name` is the published spelling.
      dtype: by numpy's name. start: its first byte in the file.
    """

    name: str
    stored: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * jnp.dtype(self.dtype).itemsize


class WeightsFolder:
    """The tensors of a folder, by published name.

    Attributes:
      entries: name -> Entry, in the order of files and of tensors inside them.
      metadata: of each file, by file name.
    """

    def __init__(self, folder: Path, mapping: HFMapping):
        """Read headers only.

        Args:
          mapping: of the model's family: how it spells names, and what it ignores.

        Raises:
          WeightsError: everything that is wrong with the files, at once: no weights, pickles only, an index that names
            absent files or climbs out of the folder, truncated files, damaged headers, tensors that are not where the
            index says, dtypes that are not floating point, names twice.
        """
        self.folder, self._mapping = folder, mapping
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        problems: list[str] = []
        expected = self._index(problems)
        files = sorted(set(expected.values())) if expected is not None else [SINGLE]
        missing_files = set()
        for file in files:
            path = folder / file
            if not path.is_file():
                missing_files.add(file)
                wanted = sum(1 for value in (expected or {}).values() if value == file)
                problems.append(f"{file}: missing; the index places {wanted} tensors in it. Download it again")
            else:
                self._scan(path, problems)
        if expected is not None:
            self._compare_with_index(expected, missing_files, problems)
        if problems:
            raise WeightsError(
                "\n".join(
                    [
                        f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''} with the weight files:",
                        *listed(problems),
                    ]
                )
            )

    def _index(self, problems: list[str]) -> dict[str, str] | None:
        """File of each stored name by the index; None when there is a single file."""
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                pickles = sorted(file.name for pattern in _PICKLES for file in self.folder.glob(pattern))
                if pickles:
                    raise WeightsError(
                        f"{self.folder}: only pickled weights ({', '.join(pickles[:3])}). A pickle can run "
                        "any code when it is read, so it is refused; "
                        "save the model with `save_pretrained`, which writes safetensors"
                    )
                raise WeightsError(f"{self.folder}: no weights; expected {SINGLE}, or {INDEX} and its files")
            return None
        weight_map = read_json(path).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise WeightsError(f"{path}: expected weight_map, an object of tensor name to file name")
        kept = {}
        for file in sorted(set(weight_map.values())):
            # By name only: the files of a download cache are links to another folder, which its owner made.
            if Path(file).is_absolute() or ".." in Path(file).parts:
                problems.append(f"{INDEX}: names {file!r}, which lies outside the folder; refused")
            elif not file.endswith(".safetensors") or len(file.encode()) > 255 or not file.isprintable():
                problems.append(f"{INDEX}: names {file!r}, which is not a safetensors file; refused")
            else:
                kept |= {name: file for name, where in weight_map.items() if where == file}
        return kept

    def _scan(self, path: Path, problems: list[str]) -> None:
        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata[path.name] = dict(file.metadata() or {})
                starts = _starts(path)
                for stored in file.offset_keys():
                    if self._mapping.ignorable(stored):
                        continue
                    view = file.get_slice(stored)
                    dtype, name = view.get_dtype(), self._mapping.canonical(stored)
                    if dtype not in FLOAT_DTYPES:
                        problems.append(
                            f"{path.name}: {stored} has dtype {dtype}; expected one of "
                            f"{', '.join(FLOAT_DTYPES)} (quantised weights are not supported)"
                        )
                    elif name in self.entries:
                        problems.append(
                            f"{path.name}: {stored} is there twice (also in {self.entries[name].file.name})"
                        )
                    else:
                        self.entries[name] = Entry(
                            name, stored, path, tuple(view.get_shape()), FLOAT_DTYPES[dtype], starts[stored]
                        )
        except SafetensorError as error:
            problems.append(
                f"{path.name}: not a whole safetensors file ({error}). {path.stat().st_size} bytes on disk; "
                "download or save it again"
            )

    def _compare_with_index(self, expected: dict[str, str], missing_files: set[str], problems: list[str]) -> None:
        readable = set(self.metadata)
        where = {entry.stored: entry.file.name for entry in self.entries.values()}
        for name, file in expected.items():
            if self._mapping.ignorable(name) or file not in readable:
                continue
            if name not in where and not any(name in problem for problem in problems):
                problems.append(f"{INDEX}: places {name} in {file}, which does not hold it")
            elif name in where and where[name] != file:
                problems.append(f"{INDEX}: places {name} in {file}, but it is in {where[name]}")
        problems += [
            f"{file}: holds {name}, which the index does not know"
            for name, file in where.items()
            if name not in expected
        ]

    def reader(self) -> Reader:
        """Open files for reading rows; use as a context manager."""
        return Reader(self)


def _starts(path: Path) -> dict[str, int]:
    """First byte of each tensor in a file whose header the library has already checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class Reader:
    """Rows of tensors, read into memory that the caller owns. Safe to call from several threads.

    Reading beats mapping the files here: no page of the mapping has to be faulted in, and a block that is turned next
    is still in the processor's cache.
    """

    def __init__(self, folder: WeightsFolder):
        self._entries = folder.entries
        self._stack = contextlib.ExitStack()
        files = sorted({entry.file for entry in folder.entries.values()})
        self._files = {file: self._stack.enter_context(file.open("rb", buffering=0)).fileno() for file in files}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def entry(self, name: str) -> Entry:
        return self._entries[name]

    def announce(self, name: str) -> None:
        """Lets the system fetch a tensor from disk ahead of its use."""
        if hasattr(os, "posix_fadvise"):
            entry = self._entries[name]
            os.posix_fadvise(
                self._files[entry.file], entry.start, entry.shape[0] * entry.row_bytes, os.POSIX_FADV_WILLNEED
            )

    def into(self, memory: np.ndarray, name: str, start: int) -> None:
        """Fill contiguous memory with a tensor's bytes from row `start` of its first axis on.

        Raises:
          WeightsError: the file ended, so it was changed after it was opened.
        """
        entry = self._entries[name]
        left = memoryview(memory.reshape(-1).view(np.uint8))
        position = entry.start + start * entry.row_bytes
        while left:
            count = os.preadv(self._files[entry.file], [left], position)
            if count == 0:
                raise WeightsError(
                    f"{entry.file}: ended while {entry.stored} was read; another program changes this file"
                )
            left, position = left[count:], position + count

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor's first axis."""
        entry = self._entries[name]
        found = np.empty((stop - start, *entry.shape[1:]), jnp.dtype(entry.dtype))
        self.into(found, name, start)
        return found
