"""Handwritten digits in a row, one digit to a visual token: read them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from examples.quickstart import assets
from examples.quickstart.pictures import CELL, ink_and_paper, paint, warp
from examples.quickstart.samples import Sample, ask

QUESTION = "Read the digits."
LONGEST = 5


def digit_strings(
    rng: random.Random, split: assets.Split, count: int, longest: int = LONGEST, bent: bool = True, more: bool = False
) -> Iterator[Sample]:
    """Strings of up to `longest` digits; those for training are bent and of several pens, unless the learner is a
    beginner.

    Args:
      bent: False for what a beginner sees. more: draw from more handwriting, as `assets.digit_cells`.
    """
    for _ in range(count):
        picture, text = draw(rng, split, rng.randint(1, longest), bent, more)
        yield ask("digits", picture, QUESTION, text)


def draw(
    rng: random.Random, split: assets.Split, length: int, bent: bool = True, more: bool = False
) -> tuple[np.ndarray, str]:
    """An image 28 pixels high and 28 wide for each of `length` digits, and what it says."""
    cells, labels = assets.digit_cells(split, more)
    chosen = [rng.randrange(len(cells)) for _ in range(length)]
    coverage = np.concatenate(
        [_place(rng, cells[index], plain=split != "train", bent=bent) for index in chosen], axis=1
    )
    picture = paint(coverage, *ink_and_paper(rng, coloured=rng.random() < 0.4))
    return picture, "".join(str(labels[index]) for index in chosen)


def _place(rng: random.Random, cell: np.ndarray, plain: bool, bent: bool) -> np.ndarray:
    """One digit in its 28-pixel square; turned, stretched and shifted when it is for training, and if so asked bent and
    of another pen.
    """
    scale, angle, shear, dx, dy, wobble = 1.25, 0.0, 0.0, 0.0, 0.0, 0.0
    digit = Image.fromarray(cell)
    if not plain:
        scale, angle, shear = rng.uniform(1.05, 1.4), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
        dx, dy = rng.uniform(-2, 2), rng.uniform(-2, 2)
        if bent:
            wobble, digit = rng.uniform(0.0, 1.0), _another_pen(rng, digit)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    a, b, d, e = cos, sin + shear / scale, -sin, cos
    middle = CELL / 2
    return np.asarray(
        warp(
            rng,
            digit,
            CELL,
            (a, b, 10 - a * (middle + dx) - b * (middle + dy), d, e, 10 - d * (middle + dx) - e * (middle + dy)),
            wobble,
            cells=3,
        )
    )


def _another_pen(rng: random.Random, digit: Image.Image) -> Image.Image:
    """Strokes somewhat broader or thinner, for half of the digits."""
    kind = rng.random()
    if kind < 0.25:
        return Image.blend(digit, digit.filter(ImageFilter.MaxFilter(3)), rng.uniform(0.2, 0.6))
    if kind < 0.5:
        return Image.blend(digit, digit.filter(ImageFilter.MinFilter(3)), rng.uniform(0.1, 0.35))
    return digit
