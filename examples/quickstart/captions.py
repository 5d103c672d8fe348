"""One-line captions, from which the projector learns while everything else is frozen."""

from __future__ import annotations

import random
from collections.abc import Iterator

from examples.quickstart import assets, digits, emoji, shapes, words
from examples.quickstart.pictures import NAMED_COLOURS
from examples.quickstart.samples import Sample, ask

QUESTION = "Describe the picture."
TEMPLATES = {
    "emoji": "{name} on {colour}",
    "digits": "the digits {value}",
    "word": "the word {value}",
    "shape": "{colour} {shape}",
}
PAPERS = {"white": (255, 255, 255)} | NAMED_COLOURS


def captions(
    rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]], start: int, count: int
) -> Iterator[Sample]:
    """Half the images are emoji, drawn from `pairs` (artist, concept)."""
    pictures = shapes.described(split)
    for number in range(start, start + count):
        kind = number % 6
        if kind < 3:
            artist, concept = rng.choice(pairs)
            colour = rng.choice(sorted(PAPERS))
            yield ask(
                "captions/emoji",
                emoji.plain(artist, concept, PAPERS[colour]),
                QUESTION,
                TEMPLATES["emoji"].format(name=assets.concepts()[concept], colour=colour),
            )
        elif kind == 3:
            picture, value = digits.draw(rng, split, rng.randint(1, 4))
            yield ask("captions/digits", picture, QUESTION, TEMPLATES["digits"].format(value=value))
        elif kind == 4:
            word = rng.choice(assets.words(split))
            yield ask(
                "captions/word",
                words.draw(rng, split, word, "cells"),
                QUESTION,
                TEMPLATES["word"].format(value=words.spelled(word)),
            )
        else:
            picture, shape, colour = pictures[rng.randrange(len(pictures))]
            yield ask(
                "captions/shape",
                picture.file.read_bytes(),
                QUESTION,
                TEMPLATES["shape"].format(colour=colour, shape=shape),
            )
