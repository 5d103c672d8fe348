"""Parquet files and WebDataset tars, read record by record without unpacking them."""

from __future__ import annotations

import bisect
import collections
import json
import os
import tarfile
import threading
from typing import Any

import pyarrow
import pyarrow.parquet

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import decode_text, foreign
from mindvl_jax.data import remote
from mindvl_jax.data.sample import SampleError, Unreadable

# Bytes of row groups kept decoded for random access: shuffled reading would decode a group again for every sample.
KEPT_BYTES = 1 << 30
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".avif",
    ".ico",
    ".mpo",
    ".jfif",
)
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg")


class ParquetRecords:
    """Rows of a parquet file. Row groups are decoded when first asked for and kept up to KEPT_BYTES.

    Shuffled reading of a file larger than that wants small row groups (a few thousand rows).
    """

    def __init__(self, path: str):
        self.path = path
        try:
            with self._file() as file:
                groups = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file: {error}") from None
        self._ends = [sum(groups[: index + 1]) for index in range(len(groups))]
        self._kept: collections.OrderedDict[int, pyarrow.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Any:
        group = bisect.bisect_right(self._ends, index)
        table = self._group(group)
        row = index - (self._ends[group - 1] if group else 0)
        return {name: _cell(column, row) for name, column in zip(table.column_names, table.columns)}

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"

    def _file(self) -> pyarrow.parquet.ParquetFile:
        if remote.is_remote(self.path):
            return pyarrow.parquet.ParquetFile(remote.opened(self.path), pre_buffer=True)
        return pyarrow.parquet.ParquetFile(self.path, memory_map=True)

    def _group(self, group: int) -> pyarrow.Table:
        with self._lock:
            table = self._kept.get(group)
            if table is None:
                try:
                    with self._file() as file:
                        table = file.read_row_group(group, use_threads=False).combine_chunks()
                except FileNotFoundError:
                    raise UserError(f"the data file {self.path} is not there any more; put it back") from None
                except (pyarrow.ArrowException, OSError) as error:
                    raise SampleError(
                        "malformed", f"row group {group} of {self.path} does not decode: {error}"
                    ) from None
                self._kept[group] = table
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(group)
            return table

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=collections.OrderedDict(), _lock=threading.Lock())


def _cell(column: pyarrow.ChunkedArray, row: int) -> Any:
    """A cell as Python has it.

    One that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) matters only to a sample that
    needs it.
    """
    try:
        return column[row].as_py()
    except (ValueError, OverflowError, pyarrow.ArrowException, ImportError) as error:
        return Unreadable(f"{type(error).__name__}: {error}")


class TarRecords:
    """Samples of a WebDataset tar: members of one base name are one sample (`0001.json` with `0001.jpg`, `0001.1.jpg`
    ...).

    The `.json` member is the record; its images are the other members in name order. A `.txt` member without a `.json`
    is taken as a caption: the image, then the text as the answer.
    """

    holds_media = True

    def __init__(self, path: str):
        self.path = path
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile() or foreign(member.name):
                        continue
                    folder, base = os.path.split(member.name)
                    key, dot, suffix = base.partition(".")
                    if dot:
                        samples.setdefault(os.path.join(folder, key), {})["." + suffix.lower()] = (
                            member.offset_data,
                            member.size,
                        )
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"{path} is not a readable tar (compressed tars have no random access: unpack the "
                f"compression first): {error}"
            ) from None
        self._samples = list(samples.items())

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        return f"{self.path} member {self._samples[index][0]}"

    def read(self, index: int) -> Any:
        key, members = self._samples[index]
        contents = {}
        try:
            with open(self.path, "rb") as file:
                for suffix in sorted(members):
                    offset, size = members[suffix]
                    file.seek(offset)
                    contents[suffix] = file.read(size)
                    if len(contents[suffix]) != size:
                        raise SampleError("malformed", f"the tar ends inside {key}{suffix}: it was cut off")
        except OSError as error:
            raise UserError(
                f"the data file {self.path} cannot be read ({error.strerror or error}); put it back"
            ) from None
        images = [
            {"bytes": data, "path": key + suffix}
            for suffix, data in contents.items()
            if suffix.endswith(IMAGE_SUFFIXES)
        ]
        videos = [
            {"bytes": data, "path": key + suffix}
            for suffix, data in contents.items()
            if suffix.endswith(VIDEO_SUFFIXES)
        ]
        if ".json" in contents:
            try:
                record = json.loads(decode_text(contents[".json"]))
            except (ValueError, RecursionError) as error:
                raise SampleError("malformed", f"{key}.json is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise SampleError("malformed", f"{key}.json holds a {type(record).__name__}; expected an object")
        elif ".txt" in contents:
            try:
                caption = decode_text(contents[".txt"]).strip()
            except UnicodeDecodeError as error:
                raise SampleError("malformed", f"{key}.txt is not UTF-8: {error}") from None
            question = "<image>" * len(images) + "<video>" * len(videos)
            record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]}
        else:
            raise SampleError(
                "malformed", f"{key} has neither a .json nor a .txt member (found {', '.join(sorted(members))})"
            )
        # The archive's own members are the media, whatever paths the record was written with.
        record = {name: value for name, value in record.items() if name not in ("image", "images", "video", "videos")}
        return {"id": os.path.basename(key), **record, "images": images, "videos": videos}
