"""One sample of the quickstart data, and the parquet files it goes into."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("task", pyarrow.string()),
        ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
        ("answers", pyarrow.list_(pyarrow.string())),
    ]
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation about at most one image.

    Attributes:
      task: what is asked, finer than the file's name (`digits`, `chat/choice` ...).
      image: PNG bytes, or None.
      turns: (question, answer) pairs in order. The image belongs to the first question.
      held_out: whether the last answer is only for scoring: then the messages end with the question.
    """

    task: str
    image: bytes | None
    turns: tuple[tuple[str, str], ...]
    held_out: bool = False

    def messages(self) -> list[dict[str, str]]:
        messages = []
        for index, (question, answer) in enumerate(self.turns):
            marker = "<image>" if index == 0 and self.image is not None else ""
            messages.append({"role": "user", "content": marker + question})
            if not (self.held_out and index == len(self.turns) - 1):
                messages.append({"role": "assistant", "content": answer})
        return messages

    def texts(self) -> Iterable[str]:
        for turn in self.turns:
            yield from turn


def ask(task: str, image: Image.Image | np.ndarray | bytes | None, question: str, answer: str) -> Sample:
    return Sample(task, png(image), ((question, answer),))


def png(image: Image.Image | np.ndarray | bytes | None) -> bytes | None:
    if image is None or isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # level 6 saves 10 % and costs half as much time again
    return out.getvalue()


def table(samples: Sequence[Sample], prefix: str, start: int) -> pyarrow.Table:
    """Rows of SCHEMA; ids are `prefix/number`, counted from `start`."""
    columns = {
        "id": [f"{prefix}/{start + index:06d}" for index in range(len(samples))],
        "task": [sample.task for sample in samples],
        "images": [[{"bytes": sample.image, "path": None}] if sample.image is not None else [] for sample in samples],
        "messages": [sample.messages() for sample in samples],
        "answers": [[sample.turns[-1][1]] for sample in samples],
    }
    return pyarrow.table(columns, schema=SCHEMA)


def write_parquet(tables: Iterable[pyarrow.Table], path: Path) -> None:
    with pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=1) as writer:
        for part in tables:
            writer.write_table(part)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> list[dict]:
    return pyarrow.parquet.read_table(path, columns=columns).to_pylist()
