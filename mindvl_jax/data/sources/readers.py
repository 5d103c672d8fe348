"""Files of samples with random access: JSON, JSONL, parquet and WebDataset tar behind one interface.

A source knows how many records it has and reads the k-th; what a record means is `record.sample_from_record`'s
business.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import decode_text, foreign
from mindvl_jax.data import remote
from mindvl_jax.data.record import sample_from_record
from mindvl_jax.data.sample import Sample, SampleError
from mindvl_jax.data.sources import tables

SUFFIXES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
}
# Shapes of records that are told apart by their fields, not by the file: all are JSON or JSONL.
JSON_SHAPES = ("mllm", "llava", "sharegpt")


class Records(Protocol):
    """Records of one file."""

    path: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """The record. Raises SampleError when it is damaged."""
        ...

    def where(self, index: int) -> str:
        """Line or row, for messages."""
        ...


class JsonRecords:
    """A JSON file with a list of records, held in memory."""

    def __init__(self, path: str):
        self.path = path
        try:
            content = json.loads(decode_text(Path(path).read_bytes()))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}. Is it a JSON file?") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {error.lineno} column {error.colno}: {error.msg}. The file must hold one JSON "
                "list of samples (one object a line goes into .jsonl)"
            ) from None
        except ValueError as error:  # a whole number of thousands of digits
            raise UserError(f"{path} holds a value that cannot be read: {error}") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deeply to be a list of samples") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        if not isinstance(content, list):
            raise UserError(f"{path} holds one {type(content).__name__}; expected a list of samples")
        self._content = content

    def __len__(self) -> int:
        return len(self._content)

    def read(self, index: int) -> Any:
        return self._content[index]

    def where(self, index: int) -> str:
        return f"{self.path} element {index}"


class JsonLines:
    """One JSON object a line; only the line starts are held in memory."""

    def __init__(self, path: str):
        self.path = path
        starts, position = [], 0
        with _opened(path) as file:
            for line in file:
                if position == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path} is text in UTF-16; save it as UTF-8 (one JSON object a line)")
                if position == 0 and line.startswith(
                    b"\xef\xbb\xbf"
                ):  # a byte order mark, which some editors put before the text
                    position, line = 3, line[3:]
                if line.strip():
                    starts.append(position)
                position += len(line)
        self._starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Any:
        start = int(self._starts[index])
        with _opened(self.path) as file:
            file.seek(start)
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SampleError("malformed", f"not JSON: {error}") from None

    def where(self, index: int) -> str:
        # Blank lines carry no record, so the line number is counted when somebody asks for it.
        try:
            with open(self.path, "rb") as file:
                lines = file.read(int(self._starts[index])).count(b"\n")
        except OSError:  # gone meanwhile: what asks for the place is on its way to say so
            return f"{self.path} record {index}"
        return f"{self.path} line {lines + 1}"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A source's file.

    One that cannot be opened any more ends the run: leaving out every sample of it would be another data set.
    """
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror or error}); put it back") from None


def _records(path: str, kind: str) -> Records:
    from mindvl_jax.data.sources import archives  # pyarrow loads slowly; JSON users need not wait for it

    opened = {
        "json": JsonRecords,
        "jsonl": JsonLines,
        "parquet": archives.ParquetRecords,
        "webdataset": archives.TarRecords,
        "csv": tables.CsvRecords,
        "tsv": tables.CsvRecords,
        "arrow": tables.ArrowRecords,
    }
    # Parquet is read by ranges where it lies; the others have no random access over a network.
    return opened[kind](remote.local_copy(path) if remote.is_remote(path) and kind != "parquet" else path)


class Source:
    """All files of one `SourceConfig`, as samples."""

    def __init__(self, name: str, config: SourceConfig):
        """Open the files and count their records.

        Raises UserError when there is no file, a file cannot be read as its format, or there is no record at all.
        """
        self.name = name
        self.identity = f"{name}:{config.model_dump_json()}"
        self._config = config
        paths = find_files(config, f"data.sources.{name}")
        self.paths = paths
        self._files = [_records(path, _kind(path, config.format)) for path in paths]
        self._ends = np.cumsum([len(records) for records in self._files]).tolist()
        self._length = min(self._ends[-1], config.max_samples or self._ends[-1])
        if self._length == 0:
            raise UserError(f"data.sources.{name}: {config.path} has no samples (files read: {', '.join(paths[:5])})")

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def digest(self) -> str:
        """Tell this content, in this order, from any other: a run that goes on must find the same records in the same
        places.
        """
        return content_digest(self.paths)

    def locate(self, index: int) -> tuple[Records, int]:
        file = bisect.bisect_right(self._ends, index)
        return self._files[file], index - (self._ends[file - 1] if file else 0)

    def where(self, index: int) -> str:
        records, inner = self.locate(index)
        return records.where(inner).replace(records.path, self._origin(records))

    def _origin(self, records: Records) -> str:
        """Path or URL that the user named for this file."""
        return self.paths[next(number for number, each in enumerate(self._files) if each is records)]

    def __getitem__(self, index: int) -> Sample:
        """The sample. Raises SampleError when its record is damaged or of no accepted shape."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        records, inner = self.locate(index)
        record = records.read(inner)
        origin = self._origin(records)
        beside = remote.parent(origin) if remote.is_remote(origin) else os.path.dirname(os.path.abspath(origin))
        root = self._config.media_root or beside
        default = f"{self.name}:{index}"
        columns = self._config.columns
        try:
            return sample_from_record(
                record,
                columns=columns,
                media_root=root,
                default_id=default,
                origin=f"{origin}#{inner}",
                media_in_file=getattr(records, "holds_media", False),
            )
        except SampleError as error:
            if isinstance(record, dict) and record.get(columns.id) is not None:
                error.sample_id = str(record[columns.id])
            raise


DIGEST_BYTES = 256 << 20
"""Read for a source's digest at most; of larger files evenly spread blocks count, beside their sizes."""
_BLOCK = 1 << 16


def content_digest(paths: Sequence[str]) -> str:
    """Digest of the files' contents in their order; the folders that they lie in do not count.

    Raises UserError for a file that is gone.
    """
    digest = hashlib.blake2b(digest_size=16)
    share = max(2 * _BLOCK, DIGEST_BYTES // max(1, len(paths)))
    for path in paths:
        if remote.is_remote(path):
            digest.update(remote.version(path).encode())
            continue
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{size};".encode())
                if size <= share:
                    while block := file.read(1 << 20):
                        digest.update(block)
                    continue
                blocks = share // _BLOCK
                for number in range(blocks):
                    file.seek((size - _BLOCK) * number // (blocks - 1))
                    digest.update(file.read(_BLOCK))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def find_files(config: SourceConfig, where: str) -> list[str]:
    """Files of a source in a fixed order.

    Raises UserError, which names the place `where` in the configuration, when there is none.
    """
    path = os.path.expanduser(config.path)
    if remote.is_remote(path):
        found = remote.list_files(path, SUFFIXES)
        _require_one_kind(found, path, config.format, where)
    elif os.path.isdir(path) and (saved := _saved_dataset(path, where)) is not None:
        found = saved
    elif os.path.isdir(path):
        found = sorted(
            entry.path
            for entry in os.scandir(path)
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not foreign(entry.name) and entry.is_file()
        )
        _require_one_kind(found, path, config.format, where)
    elif os.path.exists(path):
        found = [path]
    else:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file) and not foreign(file))
    if not found:
        raise UserError(
            f"{where}: nothing to read at {config.path!r} (working directory {os.getcwd()}); expected a "
            f"file, a folder or a glob with {', '.join(SUFFIXES)} files, or a URL such as s3://BUCKET/FILE"
        )
    return found


def _require_one_kind(files: Sequence[str], path: str, declared: str, where: str) -> None:
    kinds = {_kind(file, declared) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{where}: the folder {path} mixes {', '.join(sorted(kinds))} files; give a glob that names "
            f"one kind, such as {os.path.join(path, '*.parquet')}"
        )


def _saved_dataset(path: str, where: str) -> list[str] | None:
    try:
        return tables.saved_dataset(Path(path))
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def _kind(path: str, declared: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if declared in JSON_SHAPES:
        return "jsonl" if suffix in (".jsonl", ".ndjson") else "json"
    if declared != "auto":
        return declared
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: the ending {suffix!r} does not tell the format; known are {', '.join(SUFFIXES)}, or set format"
        )
    return SUFFIXES[suffix]


def open_sources(configs: dict[str, SourceConfig], names: Sequence[str]) -> list[Source]:
    """Open the named sources; errors of several are raised together."""
    opened, errors = [], []
    for name in names:
        try:
            opened.append(Source(name, configs[name]))
        except UserError as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(f"data.sources.{name}: {error}")
    if errors:
        raise UserError("\n".join(errors))
    return opened
