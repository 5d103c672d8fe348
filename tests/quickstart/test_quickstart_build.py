"""The build writes what its manifest lists, once, reproducibly, and in words of the compact vocabulary."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from examples.quickstart import assets, build, chat, sources, vocabulary
from examples.quickstart.standins.sets import STANDINS
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.evaluation import benchmarks
from mindvl_jax.evaluation.benchmarks import load_items

TRAIN = {
    "text",
    "digit",
    "characters",
    "emoji",
    "easyvqa_open",
    "easyvqa",
    "digits",
    "words",
    "typeset",
    "charts",
    "captions",
    "chat",
}
TEST = {"digits", "easyvqa", "emoji", "words", "typeset", "charts"}


def _rows(folder, path):
    return pyarrow.parquet.read_table(folder / path).to_pylist()


def _all_rows(folder):
    paths = (path for split in ("train", "validation", "test") for path in sorted((folder / split).glob("*.parquet")))
    return [(path.parent.name, path.stem, row) for path in paths for row in _rows(folder, path.relative_to(folder))]


@pytest.fixture(scope="module")
def rows(quickstart):
    return _all_rows(quickstart)


def test_the_files_are_those_of_the_manifest(quickstart):
    manifest = json.loads((quickstart / "manifest.json").read_text())
    found = {str(path.relative_to(quickstart)) for path in quickstart.glob("*/*.parquet")}
    assert found == set(manifest["files"]) | set(manifest["standins"])
    assert {
        path.removeprefix("train/").removesuffix(".parquet") for path in found if path.startswith("train/")
    } == TRAIN
    for split in ("validation", "test"):
        assert {
            path.removeprefix(split + "/").removesuffix(".parquet") for path in found if path.startswith(split + "/")
        } == TEST
    for path, described in (manifest["files"] | manifest["standins"]).items():
        assert pyarrow.parquet.read_metadata(quickstart / path).num_rows == described["samples"] > 0, path
        assert hashlib.sha256((quickstart / path).read_bytes()).hexdigest() == described["sha256"], path
    assert set(manifest["blind"]) == set(manifest["held_out"]) == TEST
    assert not list(quickstart.rglob(".*"))


def test_samples_have_distinct_ids_and_alternating_roles(rows):
    assert len({row["id"] for _, _, row in rows}) == len(rows)
    for split, name, row in rows:
        roles = [message["role"] for message in row["messages"]]
        expected = ["user", "assistant"] * len(roles)
        assert roles == expected[: len(roles)] and len(row["answers"]) == 1, row["id"]
        assert (roles[-1] == "assistant") == (split == "train"), (
            f"{row['id']}: an answer to score must not stand in the messages"
        )
        placeholders = sum(message["content"].count("<image>") for message in row["messages"])
        assert placeholders == len(row["images"]) == (0 if name == "text" else 1), row["id"]


def test_pictures_need_no_resizing_except_the_published_ones(rows):
    for _, name, row in rows:
        for image in row["images"]:
            width, height = Image.open(io.BytesIO(image["bytes"])).size
            published = name.startswith("easyvqa") or row["task"] in ("captions/shape", "chat/shape")
            assert (width, height) == (64, 64) if published else (width % 28 == height % 28 == 0), (
                f"{row['id']}: {width}x{height}"
            )


def test_the_compact_vocabulary_writes_every_text_and_every_published_question(quickstart, rows):
    tokenizer = load_tokenizer(TokenizerConfig(path="qwen3", id_table=str(quickstart / "id_table.json")))
    texts = {message["content"].replace("<image>", "") for _, _, row in rows for message in row["messages"]} | {
        row["answers"][0] for _, _, row in rows
    }
    for split in ("train", "test"):
        texts |= {text for picture in assets.shape_pictures(split) for pair in picture.questions for text in pair}
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size < 2500
    assert tokenizer.pad_id == 0
    for text in (
        "<|im_start|>user\n",
        "<|im_start|>system\nYou are a helpful assistant.",
        "<|vision_start|><|image_pad|><|video_pad|><|vision_end|>",
    ):
        tokenizer.encode(text, allow_special=True)


def test_the_compact_vocabulary_has_every_byte_and_every_letter_with_and_without_a_space(quickstart):
    full = load_tokenizer(TokenizerConfig(path="qwen3"))
    table = set(json.loads((quickstart / "id_table.json").read_text()))
    assert {token for byte in range(128) for token in full.encode(chr(byte))} <= table
    assert set(range(256)) <= table  # the published vocabulary gives bytes its first 256 ids
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert {token for letter in letters for token in (*full.encode(letter), *full.encode(" " + letter))} <= table


def test_the_compact_vocabulary_is_of_closed_texts_and_stand_ins_whatever_the_size(quickstart):
    questions = [
        message["content"].replace("<image>", "")
        for task in STANDINS
        for item in load_items(task.task, quickstart / "standins")
        for message in item.messages
    ]
    table = json.loads((quickstart / "id_table.json").read_text())
    assert table == vocabulary.id_table(questions)
    tokenizer = load_tokenizer(TokenizerConfig(path="qwen3", id_table=str(quickstart / "id_table.json")))
    for question in questions:
        assert tokenizer.decode(tokenizer.encode(question)) == question
    vocab_size = yaml.safe_load(Path("configs/quickstart.yaml").read_text())["model"]["text"]["vocab_size"]
    assert len(table) <= vocab_size, f"configs/quickstart.yaml has room for {vocab_size} of {len(table)} ids"


def test_training_uses_the_instructions_that_benchmarks_are_asked_with():
    assert chat.WORD_OR_PHRASE == benchmarks.WORD_OR_PHRASE
    assert chat.LETTER_DIRECTLY == "\n" + benchmarks.LETTER_DIRECTLY


def test_a_second_build_touches_nothing(quickstart):
    before = {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")}
    build.build(quickstart, "smoke", seed=0, processes=0)
    assert {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")} == before


def test_a_build_counts_as_finished_only_when_its_files_are_whole(quickstart, tmp_path):
    manifest = json.loads((quickstart / "manifest.json").read_text())
    fingerprint = manifest["fingerprint"]
    assert build._finished(quickstart, fingerprint) == manifest
    assert build._finished(quickstart, "of another seed") is None
    for path in (*manifest["files"], *manifest["standins"], "id_table.json", "manifest.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((quickstart / path).read_bytes())
    assert build._finished(tmp_path, fingerprint) == manifest
    (tmp_path / "train/digits.parquet").write_bytes(b"cut off")
    assert build._finished(tmp_path, fingerprint) is None
    (tmp_path / "manifest.json").write_text("{")
    assert build._finished(tmp_path, fingerprint) is None


def test_pieces_do_not_depend_on_the_order_in_which_they_are_made():
    work = [
        piece
        for piece in sources.pieces("standard")
        if sources.SOURCES[piece.source].path in ("train/digits.parquet", "train/text.parquet")
    ][::9]
    small = [sources.Piece(piece.source, piece.start, 20) for piece in work]
    assert [sources.make(piece, "standard", 3) for piece in small] == [
        sources.make(piece, "standard", 3) for piece in reversed(small)
    ][::-1]


def test_another_seed_changes_training_and_nothing_held_out():
    index = {source.path: number for number, source in enumerate(sources.SOURCES)}
    for name in TEST:
        held_out = sources.Piece(index[f"test/{name}.parquet"], 0, 10)
        assert (
            sources.make(held_out, "smoke", 0)
            == sources.make(held_out, "smoke", 1)
            == sources.make(held_out, "standard", 0)
        ), name
    training = sources.Piece(index["train/digits.parquet"], 0, 10)
    assert sources.make(training, "smoke", 0) != sources.make(training, "smoke", 1)


def test_pieces_cover_every_source_once():
    for size in sources.SIZES:
        for number, source in enumerate(sources.SOURCES):
            covered = [
                place
                for piece in sources.pieces(size)
                if piece.source == number
                for place in range(piece.start, piece.start + piece.count)
            ]
            assert covered == list(range(source.count(size))), source.path


def test_bad_arguments_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="smoke, standard, long"):
        build.build(tmp_path, "huge")
    monkeypatch.setattr(
        build.importlib.metadata,
        "version",
        lambda name: (_ for _ in ()).throw(build.importlib.metadata.PackageNotFoundError(name)),
    )
    assert build.main(["--out", str(tmp_path), "--size", "smoke"]) == 2
    assert "pip install" in capsys.readouterr().err
