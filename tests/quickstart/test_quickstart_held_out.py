"""Scored material is not in the training data: handwriting, artists, fonts, words, tables, published images."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet

from examples.quickstart import assets, emoji, sources

SPLITS = ("train", "validation", "test")


def _disjoint(of):
    parts = {split: set(of(split)) for split in SPLITS}
    assert all(parts.values())
    for first in SPLITS:
        for second in SPLITS:
            assert first == second or not parts[first] & parts[second], (
                f"{first} and {second} share {sorted(parts[first] & parts[second])[:5]}"
            )
    return parts


def test_no_digit_is_on_two_sides():
    parts = _disjoint(
        lambda split: [hashlib.sha256(cell.tobytes()).hexdigest() for cell in assets.digit_cells(split, more=True)[0]]
    )
    assert sum(map(len, parts.values())) >= 4990  # a few cells of the sheet may repeat within a side
    assert len(assets.digit_cells("test")[1]) == 1000
    for split in SPLITS:
        assert len(set(np.bincount(assets.digit_cells(split)[1]))) == 1, "every class has as many"


def test_the_further_digits_for_training_are_none_of_the_sheet_that_holds_the_scored_ones():
    """The two sheets are halves of one published set, resized by different programs: the same digit differs by 1.7 grey
    levels at most, so equal bytes would prove nothing. Witness of the limit: the nearest two that differ are 5.9 levels
    apart.
    """
    sheet = assets._cells("digits.png").reshape(5000, -1).astype(np.float32)
    more = assets._cells("share_alike/digits-more.png").reshape(5000, -1).astype(np.float32)
    squares = np.square(sheet).sum(1)[:, None] + np.square(more).sum(1) - 2 * sheet @ more.T
    nearest = float(np.sqrt(squares.min() / 400))
    assert nearest > 4, nearest
    assert len(assets.digit_cells("train", more=True)[1]) == len(assets.digit_cells("train")[1]) + 5000 == 8800


def test_no_font_family_word_or_table_is_on_two_sides():
    families = _disjoint(lambda split: [face.family for face in assets.faces(split)])
    assert families["test"] == {"Comic Neue", "EB Garamond", "Cantarell"}
    _disjoint(assets.words)
    _disjoint(lambda split: [column.table for column in assets.columns(split)])


def test_no_published_picture_is_on_two_sides():
    parts = _disjoint(lambda split: [picture.file for picture in assets.shape_pictures(split)])
    assert (len(parts["train"]) + len(parts["validation"]), len(parts["test"])) == (4000, 1000)
    pixels = _disjoint(
        lambda split: [
            hashlib.sha256(picture.file.read_bytes()).hexdigest() for picture in assets.shape_pictures(split)
        ]
    )
    assert len(pixels["test"]) > 990


def test_no_artist_of_the_test_drew_for_training_and_withheld_drawings_stay_away():
    parts = _disjoint(lambda split: emoji.drawings(split, 550, more=True))
    assert {artist for artist, _ in parts["train"]}.isdisjoint({artist for artist, _ in parts["test"]})
    assert {concept for _, concept in parts["train"]} == {concept for _, concept in parts["test"]} == set(range(550))
    assert {split: len(pairs) for split, pairs in parts.items()} == {
        "train": 2640 + 513 + 282,
        "validation": 110,
        "test": 1100,
    }
    for source in sources.SOURCES:
        if source.name == "emoji":
            assert source.count("standard") == len(emoji.drawings(source.split, 550)) and source.count("long") == len(
                parts[source.split]
            )
            assert source.count("smoke") == len(emoji.drawings(source.split, sources.SMOKE_CONCEPTS))


def test_the_550_names_are_distinct_and_in_every_set():
    assert len(set(assets.concepts())) == len(assets.concepts()) == 550
    for artist in (*assets.TRAIN_ARTISTS, *assets.TEST_ARTISTS):
        assert tuple(name.replace("-", " ") for name in assets._drawings(artist)["bodies"]) == assets.concepts(), artist
    for artist in assets.MORE_ARTISTS:
        drawn = {name.replace("-", " ") for name in assets._drawings(artist)["bodies"]}
        assert drawn < set(assets.concepts()) and len(drawn) == len(assets.drawn_by(artist)), artist


def test_training_text_spells_no_held_out_word(quickstart):
    """Read from the files, whatever the generators think: a spelled run of letters in training must not be a test word.

    Random strings are drawn letter by letter and may hit a word by chance, so their share must be that of chance.
    """
    held = set(assets.words("test")) | set(assets.words("validation"))
    spelled, hits = 0, []
    for path in sorted((quickstart / "train").glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path, columns=["messages"]).to_pylist():
            for message in row["messages"]:
                for run in re.findall(r"(?<![\w])(?:[a-z] ){2,4}[a-z](?![\w])", message["content"]):
                    spelled += 1
                    hits += [run] if run.replace(" ", "") in held else []
    assert spelled > 800
    assert len(hits) <= spelled * 0.005, hits


def test_charts_of_the_test_come_from_its_tables(quickstart):
    training = {label for column in assets.columns("train") for label in column.labels}
    test = {label for column in assets.columns("test") for label in column.labels}
    for path, allowed in (("train/charts.parquet", training), ("test/charts.parquet", test)):
        asked = [row["messages"][0]["content"] for row in pyarrow.parquet.read_table(quickstart / path).to_pylist()]
        labels = {found.group(1) for text in asked if (found := re.search(r"value of ((?!the ).+)\?$", text))}
        assert labels and labels <= allowed, labels - allowed


def test_every_carried_file_is_attributed():
    text = (Path(__file__).parents[2] / "ATTRIBUTIONS.md").read_text()
    for path in assets.FOLDER.rglob("*"):
        name = str(path.relative_to(assets.FOLDER))
        if path.is_file() and not name.startswith(("licences/", "fonts/")):
            assert f"`{name}`" in text, name
    rows = json.loads((assets.FOLDER / "fonts" / "fonts.json").read_text())
    assert {row["file"] for row in rows} | {"fonts.json"} == {path.name for path in (assets.FOLDER / "fonts").iterdir()}
    for row in rows:
        assert row["family"].split(" ")[0] in text and row["licence"] in text and row["copyright"], row
    for table in {column.table for split in SPLITS for column in assets.columns(split)}:
        assert table in text, table
