"""Every accepted file format gives the same samples; column names can be mapped; media stay inside their root."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_toys import encoded, picture

from mindvl_jax.config.schema import ColumnMapping, SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.media.image import load_image
from mindvl_jax.data.record import sample_from_record
from mindvl_jax.data.sample import Media, Message, SampleError
from mindvl_jax.data.sources.readers import Source

QUESTION, ANSWER = "<image>\nWhat is it?", "A ship."
MESSAGES = (Message("user", QUESTION), Message("assistant", ANSWER))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        (tmp_path / "pictures" / f"bild {index} 图.png").write_bytes(encoded(picture(index)))
    return tmp_path


def mllm(index: int) -> dict:
    return {
        "id": f"s{index}",
        "images": [f"pictures/bild {index} 图.png"],
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
    }


def llava(index: int) -> dict:
    return {
        "id": f"s{index}",
        "image": f"pictures/bild {index} 图.png",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
    }


def write(folder, kind: str):
    records = [(mllm if kind in ("mllm", "jsonl", "parquet", "webdataset") else llava)(index) for index in range(3)]
    if kind in ("mllm", "llava", "sharegpt"):
        path = folder / f"{kind}.json"
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        path = folder / "d.jsonl"
        path.write_text("\n".join(json.dumps(entry) for entry in records))
    elif kind == "parquet":
        path = folder / "d.parquet"
        rows = [
            {**entry, "images": [{"bytes": (folder / entry["images"][0]).read_bytes(), "path": None}]}
            for entry in records
        ]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path = folder / "d.tar"
        with tarfile.open(path, "w") as archive:
            for index, entry in enumerate(records):
                for suffix, data in (
                    ("json", json.dumps({**entry, "images": ["elsewhere.png"]}).encode()),
                    ("png", (folder / entry["images"][0]).read_bytes()),
                ):
                    member = tarfile.TarInfo(f"shard/{index:05d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["mllm", "llava", "sharegpt", "jsonl", "parquet", "webdataset"])
@pytest.mark.parametrize("declared", [True, False])
def test_every_format_gives_the_same_samples(folder, kind, declared):
    source = Source("a", SourceConfig(path=str(write(folder, kind)), format=kind if declared else "auto"))
    assert len(source) == 3
    for index in (2, 0, 1):
        sample = source[index]
        assert sample.id == f"s{index}" and sample.messages == MESSAGES and len(sample.images) == 1
        np.testing.assert_array_equal(np.asarray(load_image(sample.images[0])), np.asarray(picture(index)))


def test_a_tar_of_pictures_and_captions_is_read_as_questions_without_text(folder):
    path = folder / "captions.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.jpg", encoded(picture(1), "JPEG")), ("a.txt", b"Ein Schiff.\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    sample = Source("a", SourceConfig(path=str(path)))[0]
    assert sample.messages == (Message("user", "<image>"), Message("assistant", "Ein Schiff."))


def test_a_tar_cut_off_half_way_refuses_the_last_sample_or_the_file(folder):
    whole = write(folder, "webdataset").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: int(len(whole) * 0.45)])
    try:
        source = Source("a", SourceConfig(path=str(folder / "cut.tar")))
    except UserError as error:
        assert "not a readable tar" in str(error)
    else:
        with pytest.raises(SampleError):
            for index in range(len(source)):
                load_image(source[index].images[0])


def test_folders_and_globs_are_read_in_name_order_and_limited(folder):
    records = [json.dumps([{**mllm(0), "id": f"{part}-{index}"} for index in range(2)]) for part in range(3)]
    (folder / "parts").mkdir()
    for part, text in enumerate(records):
        (folder / "parts" / f"part-{part}.json").write_text(text)
    for path in (folder / "parts", folder / "parts" / "part-*.json"):
        source = Source("a", SourceConfig(path=str(path), media_root=str(folder), max_samples=5))
        assert [source[index].id for index in range(len(source))] == ["0-0", "0-1", "1-0", "1-1", "2-0"]
    with pytest.raises(IndexError):
        source[5]


def test_columns_and_roles_can_be_named():
    columns = ColumnMapping(
        id="key",
        images="pics",
        messages="dialog",
        role="who",
        content="what",
        user="Q",
        assistant="A",
        system="S",
        tool="T",
    )
    raw = {
        "key": 7,
        "pics": ["x.png"],
        "dialog": [
            {"who": "S", "what": "s"},
            {"who": "Q", "what": "<image>"},
            {"who": "T", "what": "t"},
            {"who": "A", "what": "a"},
        ],
    }
    sample = sample_from_record(raw, columns=columns, media_root="/data", default_id="d", origin="o")
    assert sample.id == "7" and [m.role for m in sample.messages] == ["system", "user", "tool", "assistant"]
    assert sample.images == (Media(path="x.png", root="/data"),)


def test_content_in_parts_becomes_text_with_placeholders():
    raw = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}, {"type": "video"}]},
            {"role": "assistant", "content": "x"},
        ]
    }
    assert (
        sample_from_record(raw, columns=ColumnMapping(), media_root=None, default_id="d", origin="o")
        .messages[0]
        .content
        == "<image>what<video>"
    )


def test_a_system_column_becomes_the_first_turn():
    raw = {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    sample = sample_from_record(raw, columns=ColumnMapping(), media_root=None, default_id="d", origin="o")
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", "malformed"),
        ([], "malformed"),
        ({"images": []}, "malformed"),
        ({"messages": "hello"}, "malformed"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": None, "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": None}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "malformed"),
        ({"messages": ["x"]}, "malformed"),
        ({"messages": [], "images": [3]}, "malformed"),
        ({"messages": [], "images": [{"bytes": None, "path": None}]}, "malformed"),
    ],
)
def test_records_of_another_shape_are_refused(raw, reason):
    with pytest.raises(SampleError) as caught:
        sample_from_record(raw, columns=ColumnMapping(), media_root=None, default_id="d", origin="o")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../x.png", "a/../../x.png", "http://example.org/x.png", "", "nul\0.png", "no.png", "."]
)
def test_paths_that_leave_the_root_or_lead_nowhere_are_refused(folder, path):
    with pytest.raises(SampleError) as caught:
        load_image(Media(path=path, root=str(folder)))
    assert caught.value.reason in ("outside_root", "missing_media", "not_a_file")


def test_an_absolute_path_inside_the_root_is_fine(folder):
    assert load_image(Media(path=str(folder / "pictures" / "bild 0 图.png"), root=str(folder))).size == (56, 56)
