"""Bar charts of real tables with questions about them. Scored on unseen tables.

One bar a row of 28 pixels: its label (two tokens), the bar (two tokens), its value (three tokens, a printed digit
each).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator

from PIL import Image, ImageDraw

from examples.quickstart import assets
from examples.quickstart.pictures import CELL, NAMED_COLOURS
from examples.quickstart.samples import Sample, ask

LABEL_CELLS, BAR_CELLS, VALUE_CELLS = 2, 2, 3
WIDTH = CELL * (LABEL_CELLS + BAR_CELLS + VALUE_CELLS)
PLACES = ("first", "second", "third", "fourth")

# What is asked: how often, and in which words.
QUESTIONS = {
    "colour": (0.26, "What is the value of the {colour} bar?"),
    "place": (0.20, "What is the value of the {place} bar?"),
    "label": (0.10, "What is the value of {label}?"),
    "largest": (0.08, "What is the largest value?"),
    "smallest": (0.06, "What is the smallest value?"),
    "longest": (0.10, "What color is the longest bar?"),
    "shortest": (0.06, "What color is the shortest bar?"),
    "place colour": (0.06, "What color is the {place} bar?"),
    "count": (0.08, "How many bars are there?"),
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """Two to four bars of distinct values in distinct colours, from the top down."""

    labels: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]


def questions(rng: random.Random, split: assets.Split, count: int) -> Iterator[Sample]:
    for _ in range(count):
        chart = choose(rng, split)
        question, answer = question_about(rng, chart)
        yield ask("charts", draw(rng, split, chart), question, answer)


def choose(rng: random.Random, split: assets.Split) -> Chart:
    # First the table, then its column: a table with fifteen columns must not be fifteen times as frequent.
    table = rng.choice(sorted({column.table for column in assets.columns(split)}))
    column = rng.choice([column for column in assets.columns(split) if column.table == table])
    rows = list(zip(column.labels, column.values))
    bars = rng.randint(2, 4)
    while True:  # every committed column has four distinct values at least, so this ends
        chosen = rng.sample(rows, bars)
        if len({value for _, value in chosen}) == bars:
            break
    labels, values = zip(*chosen)
    return Chart(labels, values, tuple(rng.sample(sorted(NAMED_COLOURS), len(chosen))))


def question_about(rng: random.Random, chart: Chart) -> tuple[str, str]:
    bars = len(chart.values)
    bar = rng.randrange(bars)
    value, colour, label = str(chart.values[bar]), chart.colours[bar], chart.labels[bar]
    longest, shortest = chart.values.index(max(chart.values)), chart.values.index(min(chart.values))
    words = {"colour": colour, "place": PLACES[bar], "label": label}
    answers = {
        **dict.fromkeys(("colour", "place", "label"), value),
        "largest": str(chart.values[longest]),
        "smallest": str(chart.values[shortest]),
        "longest": chart.colours[longest],
        "shortest": chart.colours[shortest],
        "place colour": colour,
        "count": str(bars),
    }
    kind = rng.choices(list(QUESTIONS), [share for share, _ in QUESTIONS.values()])[0]
    return QUESTIONS[kind][1].format(**words), answers[kind]


def draw(rng: random.Random, split: assets.Split, chart: Chart) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, CELL * len(chart.values)), tuple([rng.randint(235, 255)] * 3))
    pen = ImageDraw.Draw(picture)
    face = rng.choice(assets.faces(split, lining_figures=True))
    value_font = assets.font(face, rng.randint(20, 23))
    bar_left, value_left = CELL * LABEL_CELLS, CELL * (LABEL_CELLS + BAR_CELLS)
    # Bars start at 6 pixels, so that a colour can be seen however small the value is.
    longest, most = CELL * BAR_CELLS - 4, max(chart.values)
    height = rng.randint(14, 20)
    for row, (label, value, colour) in enumerate(zip(chart.labels, chart.values, chart.colours)):
        top = CELL * row
        pen.text(
            (2, top + CELL // 2),
            label,
            font=_fitting(face, label, CELL * LABEL_CELLS - 4),
            fill=(20, 20, 20),
            anchor="lm",
        )
        margin = (CELL - height) // 2
        pen.rectangle(
            (bar_left, top + margin, bar_left + 6 + round((longest - 6) * value / most), top + margin + height),
            fill=NAMED_COLOURS[colour],
        )
        for place, digit in enumerate(str(value)):
            pen.text(
                (value_left + CELL * place + CELL / 2, top + 21), digit, font=value_font, fill=(20, 20, 20), anchor="ms"
            )
    return picture


@functools.cache
def _fitting(face: assets.Face, text: str, width: int):
    for size in range(14, 7, -1):
        font = assets.font(face, size)
        if font.getlength(text) <= width:
            return font
    return assets.font(face, 7)
