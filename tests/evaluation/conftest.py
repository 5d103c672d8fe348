"""Tiny tasks of real files; the model and tokenizer are those of tests/inference."""

import importlib.util
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

_path = Path(__file__).parents[1] / "inference" / "conftest.py"
_spec = importlib.util.spec_from_file_location("inference_fixtures", _path)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tokenizer, opened, draw_pictures = _shared.tokenizer, _shared.opened, _shared.draw_pictures


def png(text: str, size=(84, 56)) -> bytes:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((8, 18), text, fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def draw_text():
    return png


@pytest.fixture(scope="session")
def samples_file(tmp_path_factory):
    """A parquet file in the training format: 24 questions about drawn numbers."""

    def write(name: str, count: int = 24, broken: tuple[int, ...] = ()) -> Path:
        rows = [
            {"id": f"s{index}", "images": [{"bytes": b"broken" if index in broken else png(str(100 + index)), "path": None}],
             "messages": [{"role": "user", "content": "<image>Which number?"}, {"role": "assistant", "content": str(100 + index)}], "task": name,
             "answers": [str(100 + index)]}
            for index in range(count)
        ]
        schema = pa.schema([
            ("id", pa.string()), ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))), ("task", pa.string()), ("answers", pa.list_(pa.string()))])
        path = tmp_path_factory.mktemp(name) / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path

    return write
