"""Assets: handwritten digits, emoji drawings, fonts, words, tables, and the published easy-VQA set.

Everything is split here, once, by what training and scoring must not share: columns of handwriting, artists, font
families, words, tables, published images. Generators ask for one split and cannot reach another.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import lzma
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFont

from mindvl_jax.core.errors import UserError

Split = Literal["train", "validation", "test"]
FOLDER = Path(__file__).parent / "assets"

# digits.png: 50 rows of 100 cells, 500 cells a class; within a class five rows, so a column is 5 images of it.
VALIDATION_COLUMNS = range(76, 80)
TEST_COLUMNS = range(80, 100)
# share_alike/digits-more.png: 5,000 digits more, all for training, in the order of their classes.
_MORE_DIGITS = (501, 627, 491, 532, 480, 363, 514, 570, 444, 478)

# Five drawings of each concept by three houses (two of them in two generations) against two artists never seen. Two
# more, who drew some of the concepts (513 and 282), are for long training only: in a short one more variety is learned
# less well.
TRAIN_ARTISTS = ("noto", "noto-v1", "twemoji", "emojione", "share_alike/emojione-v1")
MORE_ARTISTS = ("fxemoji", "streamline-emojis")
TEST_ARTISTS = ("fluent-emoji-flat", "share_alike/openmoji")

VALIDATION_WORDS, TEST_WORDS = 200, 600

VALIDATION_TABLES = frozenset({"monarchs", "obesity"})
TEST_TABLES = frozenset({"iowa electricity", "wheat", "airports", "penguins", "football", "unemployment"})

VALIDATION_PICTURES = 400  # the last ones of easy-VQA's training part; its test part is the test part


@functools.cache
def digit_cells(split: Split, more: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """((n, 20, 20) uint8 bright ink on black, (n,) labels); with `more` the training part has 8,800 digits instead of
    3,800.
    """
    pixels, labels, columns = _all_digits()
    if split == "test":
        chosen = columns >= TEST_COLUMNS.start
    elif split == "validation":
        chosen = (columns >= VALIDATION_COLUMNS.start) & (columns < VALIDATION_COLUMNS.stop)
    else:
        chosen = columns < VALIDATION_COLUMNS.start
    if more and split == "train":
        added = np.repeat(np.arange(10), _MORE_DIGITS)
        return np.concatenate([pixels[chosen], _cells("share_alike/digits-more.png")]), np.concatenate(
            [labels[chosen], added]
        )
    return pixels[chosen], labels[chosen]


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _cells("digits.png"), np.repeat(np.arange(10), 500), np.tile(np.arange(100), 50)


def _cells(file: str) -> np.ndarray:
    """(5000, 20, 20) uint8 of a sheet of 50 rows of 100."""
    sheet = np.asarray(Image.open(FOLDER / file).convert("L"))
    return sheet.reshape(50, 20, 100, 20).transpose(0, 2, 1, 3).reshape(5000, 20, 20)


@functools.cache
def concepts() -> tuple[str, ...]:
    """Names of the 550 things to be named, as the data writes them."""
    return tuple(name.replace("-", " ") for name in _drawings(TRAIN_ARTISTS[0])["bodies"])


@functools.cache
def drawn_by(artist: str) -> frozenset[int]:
    """The concepts that an artist drew: all of them, but for two."""
    bodies = _drawings(artist)["bodies"]
    return frozenset(number for number, name in enumerate(concepts()) if name.replace(" ", "-") in bodies)


@functools.cache
def _drawings(artist: str) -> Mapping:
    return json.loads(lzma.decompress((FOLDER / "emoji" / f"{artist}.json.xz").read_bytes()))


@functools.lru_cache(maxsize=1024)
def drawing(artist: str, concept: int, side: int = 64) -> Image.Image:
    """The RGBA image, `side` pixels square, of one concept by one artist."""
    import resvg_py

    drawings = _drawings(artist)
    name = concepts()[concept].replace(" ", "-")
    left, top, width, height = drawings["other_view_boxes"].get(name, drawings["view_box"])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">{drawings["bodies"][name]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))).convert("RGBA")


@dataclasses.dataclass(frozen=True)
class Face:
    """One font file; `family` is the published name of the family that it was cut from."""

    file: str
    family: str


@functools.cache
def faces(split: Split, lining_figures: bool = False) -> tuple[Face, ...]:
    """Faces of a split; with `lining_figures` only those whose digits stand as high as capitals.

    An old-style 1 is drawn as a small capital I, which no face of the training part does.
    """
    rows = json.loads((FOLDER / "fonts" / "fonts.json").read_text())
    chosen = tuple(Face(row["file"], row["family"]) for row in rows if row["split"] == split)
    return (
        tuple(face for face in chosen if _height(face, "1") > 0.85 * _height(face, "H")) if lining_figures else chosen
    )


def _height(face: Face, letter: str) -> int:
    return -font(face, 100).getbbox(letter, anchor="ls")[1]


@functools.cache
def font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: drawings must not depend on whether libraqm is installed.
    return ImageFont.truetype(FOLDER / "fonts" / face.file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def words(split: Split) -> tuple[str, ...]:
    """Lower-case English words of 3 to 5 letters. The split does not depend on the build's seed."""
    everything = (FOLDER / "words.txt").read_text().split()
    random.Random("words").shuffle(everything)
    if split == "test":
        return tuple(everything[:TEST_WORDS])
    if split == "validation":
        return tuple(everything[TEST_WORDS : TEST_WORDS + VALIDATION_WORDS])
    return tuple(everything[TEST_WORDS + VALIDATION_WORDS :])


@dataclasses.dataclass(frozen=True)
class Column:
    """One numeric column of a real table: whole numbers from 1 to 999 by label."""

    table: str
    column: str
    labels: tuple[str, ...]
    values: tuple[int, ...]


@functools.cache
def columns(split: Split) -> tuple[Column, ...]:
    everything = [
        Column(row["table"], row["column"], tuple(row["labels"]), tuple(row["values"]))
        for row in json.loads((FOLDER / "tables.json").read_text())
    ]
    part = {"test": TEST_TABLES, "validation": VALIDATION_TABLES}.get(split)
    if part is not None:
        return tuple(column for column in everything if column.table in part)
    return tuple(column for column in everything if column.table not in TEST_TABLES | VALIDATION_TABLES)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of easy-VQA with its published (question, answer) pairs."""

    file: Path
    questions: tuple[tuple[str, str], ...]


def shape_pictures(split: Split) -> tuple[Picture, ...]:
    """Images of easy-VQA.

    Raises:
      UserError: the package is not installed.
    """
    pictures = _published_pictures("test" if split == "test" else "train")
    if split == "validation":
        return pictures[-VALIDATION_PICTURES:]
    return pictures if split == "test" else pictures[:-VALIDATION_PICTURES]


@functools.cache
def _published_pictures(part: str) -> tuple[Picture, ...]:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the easy-VQA pictures come from the `easy-vqa` package, which is not installed: `pip install "
            "easy-vqa`, or run `make quickstart`, which installs what it needs"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / part
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(number, []).append((question, answer))
    return tuple(
        Picture(folder / "images" / f"{number}.png", tuple(pairs)) for number, pairs in sorted(questions.items())
    )
