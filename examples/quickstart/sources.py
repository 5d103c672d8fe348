"""Files of the quickstart data, their sizes, and how they are split into pieces for several processes.

The random numbers of a piece depend only on its name and index, so the result does not depend on the number of
processes. Validation and test pieces do not depend on the build's seed either, so scores stay comparable.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable

from examples.quickstart import assets, captions, charts, chat, digits, emoji, shapes, text, words
from examples.quickstart.samples import Sample

SIZES = ("smoke", "standard", "long")
SMOKE_CONCEPTS = 24  # emoji of the smoke build; drawing all takes longer than the smoke test
PIECE = 1000
PAIRS_OF_A_PIECE = 200  # different emoji in one piece of captions or chat: drawing costs more than everything else

Maker = Callable[[random.Random, assets.Split, int, int, str], Iterable[Sample]]


@dataclasses.dataclass(frozen=True)
class Source:
    """One parquet file, `split/name.parquet`.

    Attributes:
      counts: items at each of SIZES: samples, or emoji drawings (each gives `VARIANTS` samples).
      make: (rng, split, start, count, size) -> samples of the items from `start` on.
      piece: items made at one time.
      about: one line for the manifest.
    """

    split: assets.Split
    name: str
    counts: tuple[int, int, int]
    make: Maker
    about: str
    piece: int = PIECE

    @property
    def path(self) -> str:
        return f"{self.split}/{self.name}.parquet"

    def count(self, size: str) -> int:
        return self.counts[SIZES.index(size)]


@dataclasses.dataclass(frozen=True)
class Piece:
    source: int  # index in SOURCES; a Source holds functions that do not travel between processes
    start: int
    count: int


VARIANTS = {"smoke": 4, "standard": 10, "long": 24}


def _concepts(size: str) -> int:
    return SMOKE_CONCEPTS if size == "smoke" else len(assets.concepts())


def _some_pairs(rng: random.Random, split: assets.Split, size: str) -> list[tuple[str, int]]:
    pairs = emoji.drawings(split, _concepts(size), more=size == "long")
    return rng.sample(pairs, min(PAIRS_OF_A_PIECE, len(pairs)))


def _emoji(rng, split, start, count, size):
    pairs = emoji.drawings(split, _concepts(size), more=size == "long")[start : start + count]
    return emoji.naming(rng, split, pairs, VARIANTS[size] if split == "train" else 1)


def _captions(rng, split, start, count, size):
    return captions.captions(rng, split, _some_pairs(rng, split, size), start, count)


def _chat(rng, split, start, count, size):
    return chat.conversations(rng, split, _some_pairs(rng, split, size), count)


def _simple(make: Callable[..., Iterable[Sample]], *further) -> Maker:
    return lambda rng, split, start, count, size: make(rng, split, count, *further)


def _digits(*further) -> Maker:
    return lambda rng, split, start, count, size: digits.digit_strings(rng, split, count, *further, more=size == "long")


def _published(rng, split, start, count, size):
    return shapes.published(split, count)


def _shapes(make: Callable[..., Iterable[Sample]]) -> Maker:
    return lambda rng, split, start, count, size: make(rng, split, start, count)


def _held_out(
    name: str, make: Maker, validation: tuple[int, int, int], test: tuple[int, int, int], of: str, piece: int = PIECE
) -> list[Source]:
    return [
        Source(
            "validation", name, validation, make, f"for tuning: {of[0].lower()}{of[1:]}, from the training side", piece
        ),
        Source("test", name, test, make, of, piece),
    ]


_TRAIN_DRAWINGS, _VALIDATION_DRAWINGS, _TEST_DRAWINGS = 5 * 550 - 110, 110, 1100
_MORE_DRAWINGS = 513 + 282
_SMOKE_DRAWINGS = (5 * SMOKE_CONCEPTS - 5, 5, 2 * SMOKE_CONCEPTS)

SOURCES: tuple[Source, ...] = (
    Source(
        "train", "text", (400, 10000, 30000), _simple(text.texts), "answer formats of every task as text, no pictures"
    ),
    Source("train", "digit", (400, 8000, 20000), _digits(1, False), "one handwritten digit"),
    Source(
        "train",
        "characters",
        (400, 12000, 30000),
        _simple(words.characters),
        "one or two letters, up to three printed digits",
    ),
    Source(
        "train",
        "emoji",
        (_SMOKE_DRAWINGS[0], _TRAIN_DRAWINGS, _TRAIN_DRAWINGS + _MORE_DRAWINGS),
        _emoji,
        "550 things by five artists' sets; at size long what two more drew of them",
        110,
    ),
    Source(
        "train",
        "easyvqa_open",
        (400, 8000, 16000),
        _shapes(shapes.open_questions),
        "colour and shape, which cannot be told blind",
    ),
    Source(
        "train",
        "easyvqa",
        (400, 12000, 32000),
        _shapes(shapes.conversations),
        "published questions of the training part, up to four a picture",
    ),
    Source("train", "digits", (400, 16000, 48000), _digits(), "one to five handwritten digits"),
    Source(
        "train",
        "words",
        (400, 16000, 48000),
        _simple(words.reading, "cells"),
        "one to five letters, one to a 28-pixel square",
    ),
    Source(
        "train",
        "typeset",
        (400, 12000, 36000),
        _simple(words.reading, "typeset"),
        "one to five letters in ordinary setting",
    ),
    Source("train", "charts", (400, 9000, 36000), _simple(charts.questions), "bar charts of 11 tables"),
    Source("train", "captions", (400, 8000, 16000), _captions, "one line about a picture"),
    Source("train", "chat", (400, 8000, 24000), _chat, "other wordings, choices, yes or no, several turns, refusals"),
    *_held_out("digits", _digits(), (60, 300, 300), (60, 1000, 1000), "Handwriting of other columns of each class"),
    *_held_out("easyvqa", _published, (60, 500, 500), (60, 1500, 1500), "Published questions about other pictures"),
    *_held_out(
        "emoji",
        _emoji,
        (_SMOKE_DRAWINGS[1], _VALIDATION_DRAWINGS, _VALIDATION_DRAWINGS),
        (_SMOKE_DRAWINGS[2], _TEST_DRAWINGS, _TEST_DRAWINGS),
        "The same 550 things by other artists",
        110,
    ),
    *_held_out(
        "words",
        _simple(words.reading, "cells"),
        (60, 200, 200),
        (60, 600, 600),
        "Other words in fonts of other families",
    ),
    *_held_out(
        "typeset",
        _simple(words.reading, "typeset"),
        (60, 200, 200),
        (60, 600, 600),
        "Other words in fonts of other families, ordinary setting",
    ),
    *_held_out(
        "charts",
        _simple(charts.questions),
        (60, 300, 300),
        (60, 300, 300),
        "Charts of other tables in fonts of other families",
    ),
)


def pieces(size: str) -> list[Piece]:
    """All the work of one build, file by file."""
    return [
        Piece(number, start, min(source.piece, source.count(size) - start))
        for number, source in enumerate(SOURCES)
        for start in range(0, source.count(size), source.piece)
    ]


def make(piece: Piece, size: str, seed: int) -> list[Sample]:
    """The samples of one piece."""
    source = SOURCES[piece.source]
    name = f"{source.path}/{piece.start}"
    rng = random.Random(f"{seed}/{size}/{name}" if source.split == "train" else name)
    samples = source.make(rng, source.split, piece.start, piece.count, size)
    return [dataclasses.replace(sample, held_out=source.split != "train") for sample in samples]
