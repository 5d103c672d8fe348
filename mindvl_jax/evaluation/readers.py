"""Benchmark files as published: VLMEvalKit's TSV (pictures as base64) and lmms-eval's parquet (pictures as bytes)."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError


class Picture64:
    """A picture in base64, decoded when it is needed: a whole benchmark's pictures may not fit in memory twice."""

    def __init__(self, text: str):
        self.text = text

    def read(self) -> bytes:
        """Raises UserError when the text is not base64."""
        try:
            return base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the picture is not base64: {error}") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a benchmark file.

    Attributes:
      where: file and row, for messages. values: column -> value; empty and NaN cells are left out.
      images: pictures in order (bytes or Picture64).
    """

    where: str
    values: Mapping[str, Any]
    images: tuple[Any, ...]

    def text(self, column: str) -> str:
        """Raises UserError when the row has no such cell."""
        if column not in self.values:
            raise UserError(f"{self.where}: no {column!r} (the row has: {', '.join(self.values)})")
        return str(self.values[column])

    def get(self, column: str, default: Any = None) -> Any:
        return self.values.get(column, default)

    def list(self, column: str) -> list[str]:
        """A cell that holds a list, or text that spells one (`['a', 'b']`), or a single value."""
        value = self.values.get(column)
        if value is None:
            raise UserError(f"{self.where}: no {column!r} (the row has: {', '.join(self.values)})")
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):  # an answer that merely stands in brackets
                pass
        return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]


def read_rows(path: Path, required: Sequence[str]) -> Iterator[Row]:
    """Rows of one file.

    Args:
      required: columns that must exist; a name with `|` is any of several.

    Raises:
      UserError: unreadable file, no row, or missing columns (all named).
    """
    if path.suffix == ".tsv":
        return _tsv(path, required)
    if path.suffix == ".parquet":
        return _parquet(path, required)
    raise UserError(f"{path}: the ending {path.suffix!r} is unknown; expected .tsv (VLMEvalKit) or .parquet (lmms-eval)")


def _check(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if not any(option in columns for option in name.split("|"))]
    if missing:
        raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(name.replace('|', ' or ') for name in missing)} (it has: {', '.join(columns)})")


def _tsv(path: Path, required: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        _check(path, reader.fieldnames or (), (*required, "image"))
        seen: dict[str, str] = {}  # rows may name another row's index instead of repeating its picture
        count = 0
        for count, cells in enumerate(reader, 1):
            values = {column: value for column, value in cells.items() if column is not None and value not in (None, "")}
            where = f"{path} row {count} (index {values.get('index', '?')})"
            image = values.pop("image", None)
            pictures: tuple[Any, ...] = ()
            if image is not None:
                if len(image) <= 64 and image in seen:
                    image = seen[image]
                elif "index" in values:
                    seen[values["index"]] = image
                parts = ast.literal_eval(image) if image.startswith("[") else [image]
                pictures = tuple(Picture64(part) for part in parts)
            yield Row(where, values, pictures)
        if not count:
            raise UserError(f"{path} has a header but no rows")


def _parquet(path: Path, required: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file: {error}") from None
    columns = file.schema_arrow.names
    _check(path, columns, required)
    if not file.metadata.num_rows:
        raise UserError(f"{path} has no rows")
    number = 0
    for batch in file.iter_batches(batch_size=64):
        for cells in batch.to_pylist():
            number += 1
            pictures, values = [], {}
            for column, value in cells.items():
                if isinstance(value, dict) and "bytes" in value:
                    if value["bytes"] is None:
                        raise UserError(f"{path} row {number}: column {column!r} names a picture by path ({value.get('path')!r}); save the pictures' bytes in the file")
                    pictures.append(value["bytes"])
                elif value is not None and not (isinstance(value, float) and math.isnan(value)):
                    values[column] = value
            yield Row(f"{path} row {number}", values, tuple(pictures))
