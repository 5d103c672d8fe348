"""CSV and TSV files, and folders that `datasets.save_to_disk` wrote."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import decode_text
from mindvl_jax.data.sample import SampleError


class CsvRecords:
    """Rows of a CSV or TSV file with a header, held in memory.

    Empty cells are left out; a cell that spells a JSON list is one.
    """

    holds_media = False

    def __init__(self, path: str):
        self.path = path
        csv.field_size_limit(min(sys.maxsize, 1 << 31 - 1))  # images in base64
        try:
            text = io.StringIO(decode_text(Path(path).read_bytes()), newline="")
            reader = csv.reader(text, delimiter="\t" if path.lower().endswith(".tsv") else ",")
            self._header = [name.strip() for name in next(reader, [])]
            self._rows, self._lines = [], []
            for row in reader:
                if any(row):
                    self._rows.append(row)
                    self._lines.append(reader.line_num)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{path}: {error}") from None
        if len(set(self._header)) < len(self._header) or not all(self._header):
            raise UserError(
                f"{path}: the first line must name each column once, found "
                f"{', '.join(map(repr, self._header[:12])) or 'nothing'}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        row = self._rows[index]
        if len(row) != len(self._header):
            raise SampleError(
                "malformed",
                f"the row has {len(row)} cells, the header {len(self._header)}; quote cells that hold the "
                "separator or a line break",
            )
        return {name: _cell(text) for name, text in zip(self._header, row, strict=True) if text != ""}

    def where(self, index: int) -> str:
        return f"{self.path} line {self._lines[index]}"


def _cell(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # text in brackets
    return text


class ArrowRecords:
    """Rows of an Arrow stream, as `datasets` stores them; the file is mapped, not read."""

    holds_media = False

    def __init__(self, path: str):
        import pyarrow

        self.path = path
        try:
            self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a readable Arrow stream: {error}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, index: int) -> Any:
        return {name: self._table.column(name)[index].as_py() for name in self._table.column_names}

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"


def saved_dataset(folder: Path) -> list[str] | None:
    """Return the Arrow files of a `datasets` folder in order, or None for another folder.

    Raises:
      UserError: a folder of several splits (one of them must be named), or files that are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}; name one, such as "
            f"{folder / (splits[0] if splits else 'train')}"
        )
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    names = [
        entry["filename"] for entry in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    ]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: the data set's file {missing[0]} is missing")
    return [str(folder / name) for name in names]
