"""Short words in real fonts, spelled letter by letter: an answer is made of units that the image shows.

Two layouts: `cells` puts each letter into its own 28-pixel square, as on forms, so that a letter is one visual token;
`typeset` spaces letters as the font does, so that they straddle tokens.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from examples.quickstart import assets, digits
from examples.quickstart.pictures import CELL, ink_and_paper, paint
from examples.quickstart.samples import Sample, ask

QUESTION = "Read the word."
BASELINE = 20

Setting = Literal["cells", "typeset"]


def spelled(word: str) -> str:
    return " ".join(word)


def reading(rng: random.Random, split: assets.Split, count: int, setting: Setting) -> Iterator[Sample]:
    """Words; in training one of five is a random string of 1 to 5 letters, so that letters are read and words not
    guessed.
    """
    task = "words" if setting == "cells" else "typeset"
    known = assets.words(split)
    order = list(range(len(known)))
    rng.shuffle(order)
    for number in range(count):
        if split == "train" and rng.random() < 0.2:
            word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 5)))
        else:
            word = known[order[number % len(order)]]
        yield ask(task, draw(rng, split, word, setting), QUESTION, spelled(word))


def characters(rng: random.Random, split: assets.Split, count: int) -> Iterator[Sample]:
    """One or two letters, or one to three printed digits: what words and charts are made of."""
    for _ in range(count):
        setting = "cells" if rng.random() < 0.7 else "typeset"
        if rng.random() < 0.75:
            text = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.choice((1, 1, 2))))
            yield ask("characters", draw(rng, split, text, setting), QUESTION, spelled(text))
        else:
            text = "".join(rng.choice(string.digits) for _ in range(rng.randint(1, 3)))
            yield ask("characters", draw(rng, split, text, "cells"), digits.QUESTION, text)


def draw(rng: random.Random, split: assets.Split, text: str, setting: Setting) -> np.ndarray:
    """An image 28 pixels high; (height, width) when grey, else (height, width, 3)."""
    face = rng.choice(assets.faces(split, lining_figures=text.isdigit()))
    size = rng.randint(20, 25)
    font = assets.font(face, size)
    if setting == "cells":
        width = CELL * len(text)
    else:
        left = 3 + rng.randint(0, 3)
        width = -(-(left + round(font.getlength(text)) + 3) // CELL) * CELL
    coverage = Image.new("L", (width, CELL))
    pen = ImageDraw.Draw(coverage)
    drop = rng.randint(-1, 1)
    if setting == "cells":
        for place, letter in enumerate(text):
            pen.text(
                (CELL * place + CELL / 2 + rng.randint(-1, 1), BASELINE + drop),
                letter,
                font=font,
                fill=255,
                anchor="ms",
            )
    else:
        pen.text((left, BASELINE + drop), text, font=font, fill=255, anchor="ls")
    return paint(np.asarray(coverage), *ink_and_paper(rng, coloured=rng.random() < 0.4))
