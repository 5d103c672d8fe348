"""Images of the stand-ins: lines of text, forms, posters, diagrams and charts, all from the held-out side of the
material.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from examples.quickstart import assets, charts, digits, emoji, words
from examples.quickstart.pictures import CELL

SPLIT: assets.Split = "test"
"""The only part of the material that a stand-in may show: no training run of the quickstart has seen it."""

Colour = tuple[int, int, int]
INK: Colour = (20, 20, 20)


def face(rng: random.Random) -> assets.Face:
    """A face of a family that training never showed, with figures as high as capitals."""
    return rng.choice(assets.faces(SPLIT, lining_figures=True))


def word(rng: random.Random) -> str:
    return rng.choice(assets.words(SPLIT))


def letters(rng: random.Random, count: int) -> str:
    """A random string that is no word of the lists."""
    known = {word for split in ("train", "validation", "test") for word in assets.words(split)}
    while True:
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))
        if text not in known:
            return text


def typeset(rng: random.Random, text: str) -> Image.Image:
    """A word in ordinary setting, as the quickstart's own task draws it."""
    return Image.fromarray(words.draw(rng, SPLIT, text, "typeset")).convert("RGB")


def handwritten(rng: random.Random, length: int) -> tuple[Image.Image, str]:
    picture, text = digits.draw(rng, SPLIT, length)
    return Image.fromarray(picture).convert("RGB"), text


def turned(rng: random.Random, picture: Image.Image) -> Image.Image:
    """The image turned by 8 to 20 degrees, on its own corner's colour."""
    angle = rng.choice((-1, 1)) * rng.uniform(8, 20)
    whole = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=picture.getpixel((0, 0)))
    return on_cells(whole, picture.getpixel((0, 0)))


def on_cells(picture: Image.Image, paper: Colour = (255, 255, 255)) -> Image.Image:
    """The image in the middle of the smallest sheet whose sides are whole visual tokens: nothing is resized later."""
    width, height = (CELL * math.ceil(side / CELL) for side in picture.size)
    sheet = Image.new("RGB", (width, height), paper)
    sheet.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return sheet


def form(rng: random.Random, fields: Sequence[tuple[str, str]], title: str = "") -> Image.Image:
    """A small page: a title, a rule, and one `name: value` to a line of 28 pixels."""
    chosen = face(rng)
    size = rng.randint(16, 19)
    lines = [f"{name}: {value}" for name, value in fields]
    width = max(round(assets.font(chosen, size).getlength(line)) for line in (*lines, title)) + 24
    sheet = on_cells(Image.new("RGB", (width, CELL * (len(lines) + bool(title))), (252, 251, 247)), (252, 251, 247))
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((12, CELL // 2), title, font=assets.font(chosen, size + 2), fill=INK, anchor="lm")
        pen.line((8, CELL - 2, sheet.width - 8, CELL - 2), fill=(120, 120, 120))
    for number, line in enumerate(lines, bool(title)):
        pen.text((12, CELL * number + CELL // 2), line, font=assets.font(chosen, size), fill=INK, anchor="lm")
    return sheet


def drawing(concept: int, artist: str, side: int = 2 * CELL) -> Image.Image:
    return emoji.plain(artist, concept, side=side)


def poster(rng: random.Random, rows: Sequence[tuple[int, str]]) -> Image.Image:
    """Mixed images and text: one row for each (concept, figure): its drawing and the figure in large type."""
    chosen, artist = face(rng), rng.choice(assets.TEST_ARTISTS)
    side = 2 * CELL
    sheet = Image.new("RGB", (side * 2, side * len(rows)), tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(sheet)
    for number, (concept, figure) in enumerate(rows):
        sheet.paste(emoji.plain(artist, concept, sheet.getpixel((0, 0)), side), (0, side * number))
        pen.text(
            (side + side // 2, side * number + side // 2), figure, font=assets.font(chosen, 26), fill=INK, anchor="mm"
        )
    return sheet


def diagram(rng: random.Random, concepts: Sequence[int], labels: Sequence[str]) -> Image.Image:
    """Drawings on a two by two sheet, each with its printed label joined to it by a line."""
    chosen, artist, side = face(rng), rng.choice(assets.TEST_ARTISTS), 3 * CELL
    sheet = Image.new("RGB", (2 * side, side * math.ceil(len(concepts) / 2)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for number, (concept, label) in enumerate(zip(concepts, labels, strict=True)):
        left, top = side * (number % 2), side * (number // 2)
        sheet.paste(drawing(concept, artist), (left + CELL // 2, top))
        pen.line((left + side // 2, top + 2 * CELL - 4, left + side // 2, top + 2 * CELL + 4), fill=INK)
        pen.text(
            (left + side // 2, top + 2 * CELL + CELL // 2 + 2),
            label,
            font=assets.font(chosen, 18),
            fill=INK,
            anchor="mm",
        )
    return sheet


def scene(rng: random.Random, concepts: Sequence[int]) -> Image.Image:
    """Drawings side by side on one sheet, from left to right."""
    artist, side = rng.choice(assets.TEST_ARTISTS), 2 * CELL
    sheet = Image.new("RGB", (side * len(concepts), side), (255, 255, 255))
    for number, concept in enumerate(concepts):
        sheet.paste(drawing(concept, artist), (side * number, 0))
    return sheet


def sign(rng: random.Random, text: str, concept: int) -> Image.Image:
    """A word on a board in front of a drawing."""
    sheet = drawing(concept, rng.choice(assets.TEST_ARTISTS), 4 * CELL)
    pen = ImageDraw.Draw(sheet)
    font = assets.font(face(rng), 20)
    half = font.getlength(text) / 2 + 8
    pen.rectangle((2 * CELL - half, 3 * CELL - 14, 2 * CELL + half, 3 * CELL + 14), fill=(250, 240, 190), outline=INK)
    pen.text((2 * CELL, 3 * CELL), text, font=font, fill=INK, anchor="mm")
    return sheet


def ornate(rng: random.Random, text: str) -> Image.Image:
    """Letters of rising and falling size in many colours, outlined."""
    chosen = face(rng)
    sheet = Image.new("RGB", (CELL * (len(text) + 1), 2 * CELL), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for number, letter in enumerate(text):
        colour = tuple(rng.randint(0, 200) for _ in range(3))
        height = CELL + round(8 * math.sin(1.3 * number))
        pen.text(
            (CELL * (number + 1), height),
            letter,
            font=assets.font(chosen, 22 + 6 * (number % 2)),
            fill=colour,
            anchor="mm",
            stroke_width=1,
            stroke_fill=(60, 60, 60),
        )
    return sheet


def chart(rng: random.Random) -> tuple[charts.Chart, Image.Image]:
    """A bar chart of a table that training never showed."""
    chosen = charts.choose(rng, SPLIT)
    return chosen, charts.draw(rng, SPLIT, chosen)


def sum_of_digits(rng: random.Random) -> tuple[Image.Image, int, int]:
    """A written addition of two handwritten digits with a printed plus sign: image and both digits."""
    (left, first), (right, second) = (handwritten_black(rng) for _ in range(2))
    sheet = Image.new("RGB", (3 * CELL, CELL), (255, 255, 255))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (2 * CELL, 0))
    ImageDraw.Draw(sheet).text((3 * CELL // 2, CELL // 2), "+", font=assets.font(face(rng), 22), fill=INK, anchor="mm")
    return sheet, first, second


def handwritten_black(rng: random.Random) -> tuple[Image.Image, int]:
    """One handwritten digit, dark on white."""
    cells, labels = assets.digit_cells(SPLIT)
    number = rng.randrange(len(cells))
    ink = Image.fromarray(255 - np.asarray(cells[number])).resize((25, 25), Image.Resampling.BILINEAR)
    sheet = Image.new("L", (CELL, CELL), 255)
    sheet.paste(ink, (1, 1))
    return sheet.convert("RGB"), int(labels[number])
