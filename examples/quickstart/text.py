"""Text without images: the answer formats of every task, so that the language model knows them before it sees images.

It also teaches negation, counting and comparing. Only words of the training split occur.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from examples.quickstart import assets, charts, digits, emoji, shapes, words
from examples.quickstart.samples import Sample

TEMPLATES = {
    "digits": "{value}. " + digits.QUESTION,
    "word": "{value}. " + words.QUESTION,
    "guess": "Write a word.",
    "name": "{value}. " + emoji.QUESTION,
    "shape": "A {colour} {shape}. {question}",
    "chart": "Bars: {bars}. {question}",
    "bar": "{label}, {colour}: {value}",
}


def texts(rng: random.Random, split: assets.Split, count: int) -> Iterator[Sample]:
    kinds: list[Callable[[random.Random, assets.Split], Sample]] = [
        _digits,
        _word,
        _guess,
        _name,
        _shape,
        _shape,
        _chart,
        _chart,
    ]
    for _ in range(count):
        yield rng.choice(kinds)(rng, split)


def _digits(rng: random.Random, split: assets.Split) -> Sample:
    number = "".join(rng.choice(string.digits) for _ in range(rng.randint(1, digits.LONGEST)))
    return Sample("text/digits", None, ((TEMPLATES["digits"].format(value=" ".join(number)), number),))


def _word(rng: random.Random, split: assets.Split) -> Sample:
    word = words.spelled(
        rng.choice(assets.words(split))
        if rng.random() < 0.7
        else "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 5)))
    )
    return Sample("text/word", None, ((TEMPLATES["word"].format(value=word), word),))


def _guess(rng: random.Random, split: assets.Split) -> Sample:
    # No answer can be known; what is learned is which letters follow which.
    return Sample("text/guess", None, ((TEMPLATES["guess"], words.spelled(rng.choice(assets.words(split)))),))


def _name(rng: random.Random, split: assets.Split) -> Sample:
    name = rng.choice(assets.concepts())
    return Sample("text/name", None, ((TEMPLATES["name"].format(value=name), name),))


def _shape(rng: random.Random, split: assets.Split) -> Sample:
    shape, colour = rng.choice(shapes.SHAPES), rng.choice(shapes.COLOURS)
    question = (
        shapes.yes_no_question(rng, shape, colour)
        if rng.random() < 0.7
        else shapes.open_question(rng, shape, colour, rng.random() < 0.5)
    )
    return Sample(
        "text/shape",
        None,
        (
            (
                TEMPLATES["shape"].format(colour=colour, shape=shape, question=question),
                shapes.answer(question, shape, colour),
            ),
        ),
    )


def _chart(rng: random.Random, split: assets.Split) -> Sample:
    chart = charts.choose(rng, split)
    question, answer = charts.question_about(rng, chart)
    bars = "; ".join(
        TEMPLATES["bar"].format(label=label, colour=colour, value=value)
        for label, colour, value in zip(chart.labels, chart.colours, chart.values)
    )
    return Sample("text/chart", None, ((TEMPLATES["chart"].format(bars=bars, question=question), answer),))
