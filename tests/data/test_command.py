"""`mindvl data check` reports what a data set holds; `mindvl data convert` loses nothing in any round trip."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_toys import encoded, picture, record

from mindvl_jax.cli.main import main
from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.data.media.image import load_image
from mindvl_jax.data.sources.readers import Source


@pytest.fixture
def llava(tmp_path):
    """LLaVA-Instruct as published: bare file names, the images in COCO's folder; one image is missing."""
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    records = []
    for index in range(6):
        name = f"{index:012d}.jpg"
        if index != 3:
            (tmp_path / "coco" / "train2017" / name).write_bytes(encoded(picture(index), "JPEG"))
        records.append(
            {
                "id": f"s{index}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat {index}?"},
                    {"from": "gpt", "value": "Schiff 船"},
                ],
            }
        )
    records.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records))
    return path


def read(path, **config):
    source = Source("a", SourceConfig(path=str(path), **config))
    return {
        sample.id: (sample.messages, [np.asarray(load_image(media)).tobytes() for media in sample.images])
        for sample in (source[index] for index in range(len(source)))
    }


def test_llava_instruct_over_coco_becomes_mllm_with_paths_below_its_root(tmp_path, llava, capsys):
    out = tmp_path / "coco" / "mllm.json"
    arguments = [
        "data",
        "convert",
        str(llava),
        "--media-root",
        str(tmp_path / "coco"),
        "--media-prefix",
        "train2017",
        "--to",
        "mllm",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    records = json.loads(out.read_text())
    assert [entry["id"] for entry in records] == ["s0", "s1", "s2", "s4", "s5", "text"]
    assert records[0] == {
        "id": "s0",
        "images": ["train2017/000000000000.jpg"],
        "messages": [{"role": "user", "content": "<image>\nWhat 0?"}, {"role": "assistant", "content": "Schiff 船"}],
    }
    skipped = [json.loads(line) for line in open(f"{out}.skipped.jsonl")]
    assert [(entry["id"], entry["reason"]) for entry in skipped] == [("s3", "missing_media")]
    said = capsys.readouterr().out
    assert "6 samples written" in said and "1 samples could not be converted" in said
    assert len(read(out)) == 6
    assert main(arguments) == 2, "what exists is not overwritten"
    assert main([*arguments, "--overwrite"]) == 0


def test_every_format_converts_into_every_other_without_loss(tmp_path):
    folder = tmp_path / "start"
    folder.mkdir()
    records = []
    for index in range(4):
        media = []
        for k in range(index % 3):
            (folder / f"p{index}{k}.png").write_bytes(encoded(picture(10 * index + k)))
            media.append(f"p{index}{k}.png")
        records.append({**record(index, media=media), "task": "naming", "answers": ["a", "b"]})
    (folder / "d.json").write_text(json.dumps(records))
    expected = read(folder / "d.json")
    current, root = folder / "d.json", None
    for step, to in enumerate(["parquet", "webdataset", "jsonl", "llava", "webdataset", "mllm", "parquet", "sharegpt"]):
        ending = {"parquet": "parquet", "webdataset": "tar", "jsonl": "jsonl"}.get(to, "json")
        out = tmp_path / f"step{step}.{ending}"
        assert (
            main(
                [
                    "data",
                    "convert",
                    str(current),
                    "--to",
                    to,
                    "--out",
                    str(out),
                    *(["--media-root", root] if root else []),
                ]
            )
            == 0
        )
        assert read(out) == expected, to
        sample = Source("a", SourceConfig(path=str(out)))[0]
        assert sample.task == "naming" and sample.answers == ("a", "b")
        current = out


def test_converting_nothing_but_bad_samples_is_an_error_and_leaves_no_file(tmp_path, capsys):
    (tmp_path / "d.json").write_text(json.dumps([record(0, media=["no.png"])]))
    assert (
        main(["data", "convert", str(tmp_path / "d.json"), "--to", "parquet", "--out", str(tmp_path / "o.parquet")])
        == 2
    )
    assert "missing_media" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json"]


def test_check_counts_kept_skipped_and_repeated_samples_on_one_page(tmp_path, capsys):
    good = [record(index, words=index + 1) for index in range(5)]
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(0, 200, 200), "JPEG")[:900])
    (tmp_path / "ok.png").write_bytes(encoded(picture(1, 56, 84)))
    bad = [
        record(90, media=["gone.png"]),
        record(91, media=["cut.jpg"]),
        {"id": "r", "messages": [{"role": "user", "content": "<b>x</b>"}]},
    ]
    repeated = [{**good[0], "id": "again"}, {**record(77), "id": "s1"}]
    named = {**record(5, media=["ok.png"]), "id": "<script>alert(1)</script>"}
    (tmp_path / "d.json").write_text(json.dumps([*good, *bad, *repeated, named]))
    page = tmp_path / "out" / "page.html"
    assert main(["data", "check", str(tmp_path / "d.json"), "--out", str(page), "--tokenizer", "qwen3"]) == 0
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;" in text, "text of the data is escaped"
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "the page loads nothing"
    for reason in ("missing_media", "undecodable", "no_answer"):
        assert f"<td>{reason}</td>" in text
    assert "same turns and media as" in text and "same id as" in text
    assert text.count("data:image/webp;base64,") == 1 and text.count("<svg") == 3
    said = capsys.readouterr().out
    assert "3 of 11 samples" in said
    # Headers alone do not show the cut file.
    assert (
        main(["data", "check", str(tmp_path / "d.json"), "--out", str(page), "--tokenizer", "qwen3", "--headers-only"])
        == 0
    )
    assert "2 of 11 samples" in capsys.readouterr().out


def test_check_of_nothing_usable_says_so_and_fails(tmp_path, capsys):
    (tmp_path / "d.json").write_text(json.dumps([{"messages": []}]))
    assert (
        main(["data", "check", str(tmp_path / "d.json"), "--out", str(tmp_path / "p.html"), "--tokenizer", "qwen3"])
        == 1
    )
    assert "No sample can be used" in capsys.readouterr().out


def test_check_needs_a_path_or_a_configuration(capsys):
    assert main(["data", "check"]) == 2
    assert "either a path or --config" in capsys.readouterr().err
