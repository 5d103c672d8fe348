"""Instruction data: other wordings of each task, choices, yes or no, several turns about one image, refusals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from examples.quickstart import assets, charts, digits, emoji, shapes, words
from examples.quickstart.samples import Sample, png

# The first wording of each is the one that the task itself uses and is scored with.
WORDINGS = {
    "digits": (
        digits.QUESTION,
        "What number is this?",
        "Which digits do you see?",
        "Type the digits.",
        "what is the number in the image?",
    ),
    "word": (
        words.QUESTION,
        "Spell the word.",
        "What does it say?",
        "Which word is this?",
        "what is written in the image?",
    ),
    "emoji": (emoji.QUESTION, "Name this.", "What do you see?", "What does the picture show?"),
}
FOLLOW_UPS = {
    "digits": {
        "How many digits are there?": lambda text: str(len(text)),
        "What is the first digit?": lambda text: text[0],
        "What is the last digit?": lambda text: text[-1],
    },
    "word": {
        "How many letters are there?": lambda text: str(len(text)),
        "What is the first letter?": lambda text: text[0],
        "What is the last letter?": lambda text: text[-1],
    },
}
# The instructions that benchmarks put behind their questions (`mindvl_jax.evaluation.benchmarks` asks with them).
WORD_OR_PHRASE = "\nAnswer the question using a single word or phrase."
LETTER_DIRECTLY = "\nAnswer with the option's letter from the given choices directly."
TEMPLATES = {
    "choice": "What is this?\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer A, B, C or D.",
    "letter": f"What is this?\nA. {{a}}\nB. {{b}}\nC. {{c}}\nD. {{d}}{LETTER_DIRECTLY}",
    "called": "Is this called {name}?",
    "refusal": "There is no {thing}.",
}
THINGS = {"digits": "number", "word": "word", "chart": "chart"}

Maker = Callable[[random.Random, assets.Split, list[tuple[str, int]]], Sample]


def conversations(
    rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]], count: int
) -> Iterator[Sample]:
    makers: list[Maker] = [_digits, _word, _emoji, _choice, _called, _shape, _chart, _refusal]
    for _ in range(count):
        yield rng.choice(makers)(rng, split, pairs)


def _instructed(rng: random.Random, question: str) -> str:
    """The question, one time in three with the instruction that benchmarks add."""
    return question + WORD_OR_PHRASE if rng.random() < 1 / 3 else question


def _with_follow_ups(rng: random.Random, kind: str, text: str, answer: str) -> tuple[tuple[str, str], ...]:
    turns = [(_instructed(rng, rng.choice(WORDINGS[kind])), answer)]
    for question in rng.sample(sorted(FOLLOW_UPS[kind]), rng.randint(0, 2)):
        turns.append((question, FOLLOW_UPS[kind][question](text)))
    # Asked first, a follow-up must be answered from the image; asked later, from the answer before it.
    rng.shuffle(turns)
    return tuple(turns)


def _digits(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    picture, text = digits.draw(rng, split, rng.randint(1, digits.LONGEST))
    return Sample("chat/digits", png(picture), _with_follow_ups(rng, "digits", text, text))


def _word(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    word = rng.choice(assets.words(split))
    picture = words.draw(rng, split, word, rng.choice(("cells", "typeset")))
    return Sample("chat/word", png(picture), _with_follow_ups(rng, "word", word, words.spelled(word)))


def _emoji(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    artist, concept = rng.choice(pairs)
    name = assets.concepts()[concept]
    turns = [(_instructed(rng, rng.choice(WORDINGS["emoji"])), name)]
    if rng.random() < 0.5:
        turns.append(_called_turn(rng, concept))
    return Sample("chat/emoji", png(emoji.vary(rng, artist, concept)), tuple(turns))


def _choice(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    artist, concept = rng.choice(pairs)
    others = rng.sample([number for number in range(len(assets.concepts())) if number != concept], 3)
    options = [concept, *others]
    rng.shuffle(options)
    question = TEMPLATES[rng.choice(("choice", "letter"))].format(
        **{letter: assets.concepts()[option] for letter, option in zip("abcd", options)}
    )
    return Sample("chat/choice", png(emoji.vary(rng, artist, concept)), ((question, "ABCD"[options.index(concept)]),))


def _called(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    artist, concept = rng.choice(pairs)
    return Sample("chat/called", png(emoji.vary(rng, artist, concept)), (_called_turn(rng, concept),))


def _called_turn(rng: random.Random, concept: int) -> tuple[str, str]:
    if rng.random() < 0.5:
        return TEMPLATES["called"].format(name=assets.concepts()[concept]), "yes"
    other = rng.choice([number for number in range(len(assets.concepts())) if number != concept])
    return TEMPLATES["called"].format(name=assets.concepts()[other]), "no"


def _shape(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    return Sample("chat/shape", *_shape_parts(rng, split))


def _shape_parts(rng: random.Random, split: assets.Split) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    picture, shape, colour = rng.choice(shapes.described(split))
    questions = [shapes.yes_no_question(rng, shape, colour) for _ in range(rng.randint(1, 2))] + [
        shapes.open_question(rng, shape, colour, rng.random() < 0.5)
    ]
    rng.shuffle(questions)
    return picture.file.read_bytes(), tuple(
        (question, shapes.answer(question, shape, colour)) for question in dict.fromkeys(questions)
    )


def _chart(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    chart = charts.choose(rng, split)
    turns = dict(charts.question_about(rng, chart) for _ in range(rng.randint(2, 3)))
    return Sample(
        "chat/chart",
        png(charts.draw(rng, split, chart)),
        tuple((_instructed(rng, question), answer) for question, answer in turns.items()),
    )


def _refusal(rng: random.Random, split: assets.Split, pairs: list[tuple[str, int]]) -> Sample:
    """A task's question about an image that has nothing to answer it with."""
    shown = rng.choice(("digits", "word", "emoji"))
    if shown == "digits":
        picture, _ = digits.draw(rng, split, rng.randint(1, digits.LONGEST))
    elif shown == "word":
        picture = words.draw(rng, split, rng.choice(assets.words(split)), "cells")
    else:
        picture = emoji.vary(rng, *rng.choice(pairs))
    absent = rng.choice([kind for kind in THINGS if kind != shown])
    question = charts.QUESTIONS["count"][1] if absent == "chart" else WORDINGS[absent][0]
    return Sample("chat/refusal", png(picture), ((question, TEMPLATES["refusal"].format(thing=THINGS[absent])),))
