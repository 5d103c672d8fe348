"""Files of other systems, damaged cells and files that go away: read as meant, or refused by name."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source

TURNS = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
MARK = b"\xef\xbb\xbf"


def source(path) -> Source:
    return Source("d", SourceConfig(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", MARK + json.dumps([TURNS]).encode()), ("a.json", json.dumps([TURNS]).encode("utf-16")),
        ("a.jsonl", MARK + json.dumps(TURNS).encode()),
        ("a.jsonl", MARK + b"\r\n" + json.dumps(TURNS).encode() + b"\r\n"), ("a.ndjson", json.dumps(TURNS).encode()),
    ],
)  # fmt: skip
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert len(source(tmp_path / name)) == 1 and source(tmp_path / name)[0].messages[1].content == "Hello."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(TURNS).encode("utf-16")), ("a.json", b"\xff\xff"), ("a.json", b"[" * 100_000),
        ("a.json", b"[" + b"9" * 5000 + b"]"), ("a.json", b"{}"), ("a.json", b""), ("a.jsonl", b""),
        ("a.parquet", b"PAR1"),
        ("a.tar", b"\x1f\x8b123"), ("a.tar", b""),
    ],
)  # fmt: skip
def test_a_file_that_is_no_data_set_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        source(tmp_path / name)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "line",
    [
        b"9" * 5000,
        b"[" * 100_000,
        b"{",
        b"\xff",
        b"null",
        b"5",
        b'{"messages": 5}',
        b'{"messages": [5]}',
        b'{"messages": [{"role": 5, "content": "x"}]}',
    ],
)
def test_a_line_that_is_no_sample_is_left_out_by_itself(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + json.dumps(TURNS).encode())
    found = source(tmp_path / "a.jsonl")
    with pytest.raises(SampleError):
        found[0]
    assert found[1].messages[0].content == "Hi"


def test_files_that_other_systems_leave_behind_are_no_data(tmp_path):
    for name in ("b.jsonl", "._b.jsonl", ".hidden.jsonl", "C.JSONL"):
        (tmp_path / name).write_text(json.dumps(TURNS))
    assert sorted(path.rsplit("/", 1)[1] for path in source(tmp_path).paths) == ["C.JSONL", "b.jsonl"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("x.json", json.dumps(TURNS).encode()),
            ("._x.json", b"\0\5"),
            (".DS_Store", b"\0"),
            ("__MACOSX/._x.json", b"\0"),
            ("Thumbs.db", b"\0"),
            ("y.txt", MARK + b"Ein Bild."),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = source(tmp_path / "a.tar")
    assert len(found) == 2 and found[1].messages[1].content == "Ein Bild."


def test_a_cell_that_python_cannot_hold_matters_only_to_a_sample_that_needs_it(tmp_path):
    table = pa.Table.from_pylist([{"id": "x", **TURNS}] * 2)
    odd = {
        "text": pa.Array.from_buffers(
            pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")]
        ),
        "nano": pa.array([1, 2], pa.timestamp("ns")),
        "date": pa.array([2**31 - 1] * 2, pa.int32()).view(pa.date32()),
    }
    for name, column in odd.items():
        pq.write_table(table.append_column("when", column), tmp_path / f"{name}.parquet")
        assert source(tmp_path / f"{name}.parquet")[1].messages[0].content == "Hi"
    pq.write_table(table.set_column(table.column_names.index("id"), "id", odd["text"]), tmp_path / "used.parquet")
    assert source(tmp_path / "used.parquet")[0].id == "a"
    with pytest.raises(SampleError, match="'id' cannot be read"):
        source(tmp_path / "used.parquet")[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_a_data_file_that_goes_away_ends_the_run_by_its_name(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(TURNS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([TURNS]), path)
    else:
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("x.json")
            member.size = len(json.dumps(TURNS))
            tar.addfile(member, io.BytesIO(json.dumps(TURNS).encode()))
    found = source(path)
    path.unlink()
    with pytest.raises(UserError, match=path.name) as error:
        found[0]
    assert not isinstance(error.value, SampleError)


def test_a_digest_tells_order_and_content_and_not_the_folder(tmp_path):
    for folder, order in (("a", (0, 1)), ("b", (0, 1)), ("c", (1, 0))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.jsonl").write_text(
            "".join(json.dumps({"id": str(index), **TURNS}) + "\n" for index in order)
        )
    first, same, other = (source(tmp_path / folder / "d.jsonl").digest for folder in "abc")
    assert first == same != other
