"""The two published forms: lmms-eval's parquet (images as bytes, typed for the `datasets` library) and VLMEvalKit's TSV
(base64).
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from examples.quickstart.samples import png
from mindvl_jax.core.files import replacing

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
Row = Mapping[str, Any]


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """One parquet file. Values are texts, whole numbers, lists of texts, images or None; a column keeps one kind.

    The schema's metadata names the image columns the way the `datasets` library does, so that it opens them as images.
    """
    columns = list(rows[0])
    kinds = {column: _kind([row[column] for row in rows], column) for column in columns}
    arrow = {
        "image": IMAGE,
        "texts": pyarrow.list_(pyarrow.string()),
        "text": pyarrow.string(),
        "number": pyarrow.int64(),
    }
    text = {"dtype": "string", "_type": "Value"}
    named = {
        "image": {"_type": "Image"},
        "texts": {"feature": text, "_type": "Sequence"},
        "text": text,
        "number": {"dtype": "int64", "_type": "Value"},
    }
    schema = pyarrow.schema([(column, arrow[kinds[column]]) for column in columns])
    schema = schema.with_metadata(
        {"huggingface": json.dumps({"info": {"features": {column: named[kinds[column]] for column in columns}}})}
    )
    cells = {column: [_cell(row[column]) for row in rows] for column in columns}
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(cells, schema=schema), temporary, compression="zstd")


def _kind(values: Sequence[Any], column: str) -> str:
    if any(isinstance(value, Image.Image) for value in values) or column.removeprefix("image_").isdigit():
        return "image"
    if any(isinstance(value, list) for value in values):
        return "texts"
    return "number" if all(isinstance(value, int) for value in values) else "text"


def _cell(value: Any) -> Any:
    return {"bytes": png(value), "path": None} if isinstance(value, Image.Image) else value


def write_tsv(path: Path, rows: Sequence[Row]) -> None:
    """One TSV file.

    The first column is `index`; a list is written as Python spells it; images are base64, and an image that an earlier
    row has already shown is named by that row's index, as the published files do.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    shown: dict[int, str] = {}

    def cell(row: Row, column: str) -> str:
        value = row.get(column)
        if isinstance(value, Image.Image):
            if id(value) in shown:
                return shown[id(value)]
            shown[id(value)] = str(row["index"])
            return base64.b64encode(png(value)).decode()
        if isinstance(value, list) and value and isinstance(value[0], Image.Image):
            return str([base64.b64encode(png(picture)).decode() for picture in value])
        return "" if value is None else str(value)

    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([cell(row, column) for column in columns] for row in rows)
