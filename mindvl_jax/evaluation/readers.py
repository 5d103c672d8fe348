"""Benchmark files as published: VLMEvalKit's TSV (images as base64) and lmms-eval's parquet (images as bytes)."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import math
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.media.inline import InlineError, decode_base64


class Picture64:
    """An image in base64, decoded when it is needed: a whole benchmark's images may not fit in memory twice."""

    def __init__(self, text: str):
        self.text = text

    def read(self) -> bytes:
        """Raise UserError when the text is not base64."""
        try:
            return decode_base64(self.text)
        except InlineError as error:
            raise UserError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a benchmark file.

    Attributes:
      where: file and row, for messages. values: column -> value; empty and NaN cells are left out.
      images: images in order (bytes or Picture64).
    """

    where: str
    values: Mapping[str, Any]
    images: tuple[Any, ...]

    def text(self, column: str) -> str:
        """Raise UserError when the row has no such cell."""
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
            value = spelled_list(value)
        return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]


LONGEST_LIST = 100_000  # characters of a cell that is taken for a list written out


def spelled_list(text: str) -> Any:
    """Parse a cell that spells a list: `['a', 'b']` as Python writes it, `['a' 'b']` as numpy prints it.

    The text itself when it merely stands in brackets.
    """
    if len(text) > LONGEST_LIST:
        return text
    try:
        kinds = [
            token
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
        ]
        if len(kinds) > 3 and all(token.type == tokenize.STRING for token in kinds[1:-1]):
            return [ast.literal_eval(token.string) for token in kinds[1:-1]]  # Python would join them into one word
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return text


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
    raise UserError(
        f"{path}: the ending {path.suffix!r} is unknown; expected .tsv (VLMEvalKit) or .parquet (lmms-eval)"
    )


def _check(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if not any(option in columns for option in name.split("|"))]
    if missing:
        raise UserError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} "
            f"{', '.join(name.replace('|', ' or ') for name in missing)} (it has: {', '.join(columns)})"
        )


def _tsv(path: Path, required: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            _check(path, reader.fieldnames or (), (*required, "image"))
            rows = [
                {column: value for column, value in cells.items() if column is not None and value not in (None, "")}
                for cells in reader
            ]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
    except (csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{path} has a header but no rows")
    # Rows may name another row's index instead of repeating its image; that row may come later.
    stored = {cells["index"]: cells["image"] for cells in rows if "index" in cells and len(cells.get("image", "")) > 64}
    for count, cells in enumerate(rows, 1):
        where = f"{path} row {count} (index {cells.get('index', '?')})"
        image = cells.pop("image", None)
        parts = []
        if image is not None:
            if len(image) <= 64:
                image = stored.get(image, image)
            parts = spelled_list(image) if image.startswith("[") and len(image) <= LONGEST_LIST else _image_list(image)
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: the image cell is neither base64 nor a list of it")
        yield Row(where, cells, tuple(Picture64(part) for part in parts))


def _image_list(cell: str) -> list[str]:
    """The base64 texts of a cell: one, or a list written out.

    No character of base64 is a quote, so nothing needs to be evaluated.
    """
    if not cell.startswith("["):
        return [cell]
    return [part for part in re.split(r"[\[\]'\",\s]+", cell) if part]


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
                        raise UserError(
                            f"{path} row {number}: column {column!r} names an image by path "
                            f"({value.get('path')!r}); save the images' bytes in the file"
                        )
                    pictures.append(value["bytes"])
                elif value is not None and not (isinstance(value, float) and math.isnan(value)):
                    values[column] = value
            yield Row(f"{path} row {number}", values, tuple(pictures))
