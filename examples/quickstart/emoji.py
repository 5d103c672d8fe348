"""Emoji of 550 things by several artists: name them. Scored on artists never seen."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from examples.quickstart import assets
from examples.quickstart.samples import Sample, ask

QUESTION = "What is this?"
SIDE = 56
ONE_WITHHELD_OF = 5  # every fifth concept lacks one training artist, whose drawing of it is for validation

# Names that a mirrored image would contradict.
_HANDED = re.compile(r"\b(left|right|quarter|crescent|gibbous|oclock|thirty|flag|raised|lowered)\b")


def withheld(artist: int, concept: int) -> bool:
    """Whether this drawing is kept from training, for validation."""
    return concept % ONE_WITHHELD_OF == 0 and (concept // ONE_WITHHELD_OF) % len(assets.TRAIN_ARTISTS) == artist


def drawings(split: assets.Split, concepts: int, more: bool = False) -> list[tuple[str, int]]:
    """(artist, concept) pairs of a split, over the first `concepts` concepts; with `more` those of the further artists
    too.
    """
    if split == "test":
        return [(artist, concept) for artist in assets.TEST_ARTISTS for concept in range(concepts)]
    pairs = [(number, concept) for number in range(len(assets.TRAIN_ARTISTS)) for concept in range(concepts)]
    chosen = [
        (assets.TRAIN_ARTISTS[number], concept)
        for number, concept in pairs
        if withheld(number, concept) == (split == "validation")
    ]
    if more and split == "train":
        chosen += [
            (artist, concept)
            for artist in assets.MORE_ARTISTS
            for concept in range(concepts)
            if concept in assets.drawn_by(artist)
        ]
    return chosen


def naming(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]], variants: int) -> Iterator[Sample]:
    for artist, concept in pairs:
        for _ in range(variants):
            picture = vary(rng, artist, concept) if split == "train" else plain(artist, concept)
            yield ask("emoji", picture, QUESTION, assets.concepts()[concept])


def plain(artist: str, concept: int, paper: tuple[int, int, int] = (255, 255, 255), side: int = SIDE) -> Image.Image:
    drawn = assets.drawing(artist, concept).resize((side - 4, side - 4), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (side, side), paper)
    canvas.paste(drawn, (2, 2), drawn)
    return canvas


def vary(rng: random.Random, artist: str, concept: int) -> Image.Image:
    """Augment a drawing: rotate, stretch, shift and recolour it."""
    drawn = assets.drawing(artist, concept)
    if rng.random() < 0.15:
        drawn = _outline(drawn)
    drawn = _recolour(rng, drawn)
    side = drawn.width
    scale, aspect, angle = (
        rng.uniform(0.78, 1.08) * SIDE / side,
        rng.uniform(0.9, 1.1),
        math.radians(rng.uniform(-12, 12)),
    )
    mirror = -1 if rng.random() < 0.4 and not _HANDED.search(assets.concepts()[concept]) else 1
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    a, b, d, e = mirror * cos * aspect, sin * aspect, -mirror * sin / aspect, cos / aspect
    x, y = SIDE / 2 + rng.uniform(-3, 3), SIDE / 2 + rng.uniform(-3, 3)
    matrix = (a, b, side / 2 - a * x - b * y, d, e, side / 2 - d * x - e * y)
    placed = drawn.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (SIDE, SIDE), _paper(rng))
    canvas.paste(placed, (0, 0), placed)
    return canvas


def _paper(rng: random.Random) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.4:
        return (255, 255, 255)
    low = 170 if kind < 0.85 else 0
    return tuple(rng.randint(low, 255) for _ in range(3))


def _outline(drawn: Image.Image) -> Image.Image:
    """Dark lines along the borders of areas: some artists draw contours, some only areas."""
    grey = drawn.convert("L")
    edges = ImageChops.subtract(grey.filter(ImageFilter.MaxFilter(3)), grey.filter(ImageFilter.MinFilter(3)))
    alpha = drawn.getchannel("A")
    border = ImageChops.subtract(alpha.filter(ImageFilter.MaxFilter(3)), alpha.filter(ImageFilter.MinFilter(3)))
    lines = ImageChops.lighter(edges.point(lambda value: min(255, max(0, value - 48) * 4)), border)
    lined = drawn.copy()
    lined.paste((20, 20, 20, 255), (0, 0), lines)
    return lined


def _recolour(rng: random.Random, drawn: Image.Image) -> Image.Image:
    """Random saturation, hue (a rotation about the grey axis), brightness and contrast; alpha is kept."""
    pixels = np.asarray(drawn).astype(np.float32)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.6, 1.4)
    hue = math.radians(rng.gauss(0, 10))
    cos, sin = math.cos(hue), math.sin(hue) / math.sqrt(3)
    third = (1 - cos) / 3
    rotation = np.float32(
        [
            [cos + third, third - sin, third + sin],
            [third + sin, cos + third, third - sin],
            [third - sin, third + sin, cos + third],
        ]
    )
    colour = saturation * rotation + (1 - saturation) * np.full((3, 3), 1 / 3, np.float32)
    gain, offset = rng.uniform(0.8, 1.15), rng.uniform(-20, 20)
    changed = (pixels[..., :3] @ colour.T - 128) * gain + 128 + offset
    return Image.fromarray(
        np.concatenate([np.clip(changed, 0, 255), pixels[..., 3:]], axis=-1).astype(np.uint8), "RGBA"
    )
