"""Colours and small drawing helpers that several tasks share.

Images are multiples of 28 pixels: no resizing blurs them.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
from PIL import Image

CELL = 28  # pixels of one visual token: 14-pixel patches, merged two by two

# Colours that questions name, far enough apart to tell at one token's size.
NAMED_COLOURS = {
    "red": (214, 39, 40),
    "blue": (38, 84, 200),
    "green": (40, 150, 60),
    "orange": (255, 140, 20),
    "purple": (140, 70, 180),
    "black": (30, 30, 30),
}


def ink_and_paper(rng: random.Random, coloured: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours whose brightness differs by at least 110 of 255; light paper three times out of four."""
    if not coloured:
        light, dark = rng.randint(190, 255), rng.randint(0, 80)
        pair = (dark,) * 3, (light,) * 3
    else:
        pair = tuple(rng.randint(0, 120) for _ in range(3)), tuple(rng.randint(195, 255) for _ in range(3))
        # Three channels near 120 against three near 195 would be hard to see; one dark channel keeps the distance.
        darkest = rng.randrange(3)
        pair = tuple(0 if channel == darkest else value for channel, value in enumerate(pair[0])), pair[1]
    return pair if rng.random() < 0.75 else (pair[1], pair[0])


def paint(coverage: np.ndarray, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> np.ndarray:
    """Mixes two colours by a (height, width) uint8 coverage; (height, width) when both are grey, else (height, width,
    3).
    """
    share = coverage.astype(np.float32)[..., None] / 255
    grey = len(set(ink)) == 1 and len(set(paper)) == 1
    ink_, paper_ = np.float32(ink[:1] if grey else ink), np.float32(paper[:1] if grey else paper)
    mixed = np.rint(paper_ + share * (ink_ - paper_)).astype(np.uint8)
    return mixed[..., 0] if grey else mixed


def warp(
    rng: random.Random, picture: Image.Image, side: int, affine: tuple[float, ...], wobble: float, cells: int
) -> Image.Image:
    """The image seen through a map from a square of `side` pixels to its own, bent a little.

    Args:
      affine: (a, b, c, d, e, f), from a place (x, y) of the result to (a x + b y + c, d x + e y + f) of `picture`, as
        PIL wants it.
      wobble: standard deviation, in pixels of `picture`, by which each corner of a grid of `cells` x `cells` is moved
        besides; between corners the map is bilinear, so it stays continuous. 0 is the affine map alone.
    """
    a, b, c, d, e, f = affine
    if wobble == 0:
        return picture.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    places = [round(number * side / cells) for number in range(cells + 1)]
    corner = {
        (x, y): (a * x + b * y + c + rng.gauss(0, wobble), d * x + e * y + f + rng.gauss(0, wobble))
        for x in places
        for y in places
    }
    mesh = [
        (
            (left, top, right, bottom),
            (*corner[left, top], *corner[left, bottom], *corner[right, bottom], *corner[right, top]),
        )
        for left, right in itertools.pairwise(places)
        for top, bottom in itertools.pairwise(places)
    ]
    return picture.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
