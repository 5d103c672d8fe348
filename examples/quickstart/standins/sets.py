"""Questions of the eight stand-ins. Each maker returns rows in lmms-eval's columns and rows in VLMEvalKit's columns.

Wordings are those of the benchmarks' own kinds of question; what an image shows is known exactly, because it was drawn
from it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from examples.quickstart import assets, charts, shapes
from examples.quickstart.standins import pictures

LETTERS = "ABCD"
FIELDS = ("name", "place", "code", "date", "total", "phone", "item", "page")


@dataclasses.dataclass(frozen=True)
class StandIn:
    """One stand-in: the benchmark that it stands for, its file names, how many questions, and how to make them."""

    task: str
    parquet: str
    tsv: str
    count: int
    make: Callable[[random.Random, int], Iterator[tuple[dict[str, Any], dict[str, Any]]]]
    about: str


# --- documents and posters
# ----------------------------------------------------------------------------------------------


def _form(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str]]]:
    values = {
        "name": pictures.word(rng).capitalize(),
        "place": pictures.word(rng).capitalize(),
        "code": pictures.letters(rng, 4).upper(),
        "date": f"{rng.randint(1, 28)} {rng.choice(('May', 'June', 'July'))} {rng.randint(1950, 1999)}",
        "total": f"{rng.randint(10, 999)}.{rng.randint(10, 99)}",
        "phone": str(rng.randint(10000, 99999)),
        "item": pictures.word(rng),
        "page": str(rng.randint(1, 90)),
    }
    fields = [(name, values[name]) for name in rng.sample(FIELDS, rng.randint(3, 4))]
    return pictures.form(rng, fields, pictures.word(rng).upper()), fields


def documents(rng: random.Random, count: int):
    for number in range(count):
        page, fields = _form(rng)
        name, value = rng.choice(fields)
        question = f"What is the {name}?"
        answers = list(dict.fromkeys((value, value.lower(), f"{name}: {value}")))
        yield (
            {
                "questionId": str(number),
                "question": question,
                "question_types": ["form"],
                "image": page,
                "docId": str(number),
                "ucsf_document_id": "",
                "ucsf_document_page_no": "1",
                "answers": answers,
                "data_split": "val",
            },
            {"index": number, "image": page, "question": question, "answer": answers},
        )


def posters(rng: random.Random, count: int):
    for number in range(count):
        rows = [(concept, str(rng.randint(2, 999))) for concept in rng.sample(range(len(assets.concepts())), 3)]
        picture = pictures.poster(rng, rows)
        concept, figure = rng.choice(rows)
        name = assets.concepts()[concept]
        if rng.random() < 0.6:
            question, answers, kind = f"Which number stands beside the {name}?", [figure], "single-span"
        elif rng.random() < 0.5:
            question, answers, kind = f"What is shown beside {figure}?", [name, f"the {name}"], "single-span"
        else:
            question, answers, kind = (
                "What is the largest number?",
                [str(max(int(value) for _, value in rows))],
                "non-extractive",
            )
        yield (
            {
                "questionId": str(number),
                "question": question,
                "answers": answers,
                "answer_type": [kind],
                "image": picture,
                "image_url": "",
                "operation/reasoning": [],
                "ocr": "",
                "data_split": "val",
            },
            {"index": number, "image": picture, "question": question, "answer": answers},
        )


# --- charts
# -------------------------------------------------------------------------------------------------------------


def _by_hand(rng: random.Random, chart: charts.Chart) -> tuple[str, str]:
    """A question that needs more than one bar, as people ask: the human part of ChartQA."""
    first, second = rng.sample(range(len(chart.values)), 2)
    high, low = sorted((chart.values[first], chart.values[second]), reverse=True)
    one, other = chart.colours[first], chart.colours[second]
    return rng.choice(
        (
            (f"What is the difference between the {one} bar and the {other} bar?", str(high - low)),
            (f"What is the sum of the {one} bar and the {other} bar?", str(high + low)),
            (
                f"Is the {one} bar longer than the {other} bar?",
                "Yes" if chart.values[first] > chart.values[second] else "No",
            ),
            ("What is the average of all bars?", f"{sum(chart.values) / len(chart.values):.2f}"),
            (
                f"What is the ratio of the {one} bar to the {other} bar?",
                f"{chart.values[first] / chart.values[second]:.2f}",
            ),
        )
    )


def chart_questions(rng: random.Random, count: int):
    for number in range(count):
        chart, picture = pictures.chart(rng)
        human = number % 2 == 0
        question, answer = _by_hand(rng, chart) if human else charts.question_about(rng, chart)
        yield (
            {
                "type": "human_test" if human else "augmented_test",
                "question": question,
                "answer": answer,
                "image": picture,
            },
            {
                "index": number,
                "image": picture,
                "question": question,
                "answer": answer,
                "split": "test_human" if human else "test_augmented",
            },
        )


# --- reading
# ------------------------------------------------------------------------------------------------------------


def _read(rng: random.Random, kind: str) -> tuple[Image.Image, str, list[str], str]:
    """(image, question, answers, name of a data set) of one category of OCRBench."""
    written = "what is written in the image?"
    if kind == "Regular Text Recognition":
        text = pictures.word(rng)
        return pictures.typeset(rng, text), written, [text], "IIIT5K"
    if kind == "Irregular Text Recognition":
        text = pictures.word(rng)
        return pictures.turned(rng, pictures.typeset(rng, text)), written, [text], "IC15"
    if kind == "Artistic Text Recognition":
        text = pictures.word(rng)
        return pictures.ornate(rng, text), written, [text], "WordArt"
    if kind == "Handwriting Recognition":
        picture, text = pictures.handwritten(rng, 1)
        return picture, written, [text], "IAM"
    if kind == "Digit String Recognition":
        picture, text = pictures.handwritten(rng, rng.randint(3, 5))
        return picture, "what is the number in the image?", [text], "ORAND"
    if kind == "Non-Semantic Text Recognition":
        text = pictures.letters(rng, rng.randint(4, 5))
        return pictures.typeset(rng, text), written, [text], "NonSemanticText"
    if kind == "Scene Text-centric VQA":
        text = pictures.word(rng)
        return (
            pictures.sign(rng, text, rng.randrange(len(assets.concepts()))),
            "What does the sign say?",
            [text, text.capitalize()],
            "textVQA",
        )
    page, fields = _form(rng)
    name, value = rng.choice(fields)
    if kind == "Doc-oriented VQA":
        return page, f"What is the {name}?", [value], "docVQA"
    if kind == "Key Information Extraction":
        return (
            page,
            f"what is the '{name.capitalize()}'? Answer this question using the text in the image directly.",
            [value],
            "SROIE",
        )
    picture, first, second = pictures.sum_of_digits(rng)
    return (
        picture,
        "Please write out the expression of the formula in the image using LaTeX format.",
        [f"{first} + {second}"],
        "HME100k",
    )


OCR_KINDS = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


def reading(rng: random.Random, count: int):
    for number in range(count):
        kind = OCR_KINDS[number % len(OCR_KINDS)]
        picture, question, answers, data_set = _read(rng, kind)
        yield (
            {"dataset": data_set, "question": question, "question_type": kind, "answer": answers, "image": picture},
            {"index": number, "image": picture, "question": question, "answer": answers, "category": kind},
        )


# --- choices
# ------------------------------------------------------------------------------------------------------------


def _shuffled(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def diagrams(rng: random.Random, count: int):
    for number in range(count):
        concepts = rng.sample(range(len(assets.concepts())), 4)
        labels = rng.sample("EFGHKLMNPRST", 4)  # letters that no option bears
        picture = pictures.diagram(rng, concepts, labels)
        place = rng.randrange(4)
        names = [assets.concepts()[concept] for concept in concepts]
        if number % 2:
            question, (options, right) = (
                f"What does the label {labels[place]} mark?",
                _shuffled(rng, names[place], names[:place] + names[place + 1 :]),
            )
        else:
            question, (options, right) = (
                f"Which label marks the {names[place]}?",
                _shuffled(rng, labels[place], labels[:place] + labels[place + 1 :]),
            )
        yield (
            {"question": question, "options": options, "answer": str(right), "image": picture},
            {
                "index": number,
                "image": picture,
                "question": question,
                **dict(zip(LETTERS, options)),
                "answer": LETTERS[right],
                "category": "labels",
            },
        )


def _choice(rng: random.Random, number: int) -> tuple[Image.Image, str, str, list[str], str, str]:
    """(image, question, right, wrong, category, upper category)."""
    names = assets.concepts()
    kind = number % 4
    if kind == 0:
        right, *wrong = rng.sample(range(len(names)), 4)
        picture = pictures.drawing(right, rng.choice(assets.TEST_ARTISTS))
        return (
            picture,
            "What is this?",
            names[right],
            [names[other] for other in wrong],
            "object_localization",
            "finegrained_perception (instance-level)",
        )
    if kind == 1:
        published, shape, colour = rng.choice(shapes.described(pictures.SPLIT))
        picture = Image.open(published.file).convert("RGB")
        return (
            picture,
            f"What color is the {shape}?",
            colour,
            rng.sample([other for other in shapes.COLOURS if other != colour], 3),
            "attribute_recognition",
            "finegrained_perception (instance-level)",
        )
    if kind == 2:
        text = pictures.word(rng)
        return (
            pictures.typeset(rng, text),
            "Which word is this?",
            text,
            rng.sample([other for other in assets.words(pictures.SPLIT) if other != text], 3),
            "ocr",
            "finegrained_perception (instance-level)",
        )
    while True:  # four bars give four options
        chart, picture = pictures.chart(rng)
        if len(chart.values) == 4:
            break
    longest = chart.values.index(max(chart.values))
    wrong = [colour for colour in chart.colours if colour != chart.colours[longest]]
    return (
        picture,
        "What color is the longest bar?",
        chart.colours[longest],
        wrong,
        "structuralized_imagetext_understanding",
        "logic_reasoning",
    )


def rotations(rng: random.Random, count: int):
    """Each question in its four rotations of options, under index + 1,000,000 times the turn: the circular form."""
    for number in range(count // 4):
        picture, question, right, wrong, category, upper = _choice(rng, number)
        options, _ = _shuffled(rng, right, wrong)
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            common = {
                "question": question,
                "hint": "nan",
                **dict(zip(LETTERS, turned)),
                "answer": LETTERS[turned.index(right)],
                "category": category,
                "source": "stand-in",
            }
            index = number + 1_000_000 * turn
            yield (
                {"index": index, **common, "image": picture, "L2-category": upper, "comment": "nan", "split": "dev"},
                {"index": index, "image": picture, **common, "l2-category": upper, "split": "dev"},
            )


# --- yes or no
# ----------------------------------------------------------------------------------------------------------


def _pair(rng: random.Random, category: str) -> tuple[Image.Image, str, str]:
    """(image, what is asked when the answer is yes, when it is no)."""
    names = assets.concepts()
    if category in ("existence", "count", "position"):
        shown = rng.sample(range(len(names)), rng.randint(2, 4))
        picture = pictures.scene(rng, shown)
        if category == "existence":
            absent = rng.choice([concept for concept in range(len(names)) if concept not in shown])
            return (
                picture,
                f"Is there a {names[rng.choice(shown)]} in this image?",
                f"Is there a {names[absent]} in this image?",
            )
        if category == "count":
            return (
                picture,
                f"Are there {len(shown)} things in this image?",
                f"Are there {len(shown) + 1} things in this image?",
            )
        left, right = shown[0], shown[-1]
        return (
            picture,
            f"Is the {names[left]} on the left of the {names[right]}?",
            f"Is the {names[left]} on the right of the {names[right]}?",
        )
    if category == "color":
        published, shape, colour = rng.choice(shapes.described(pictures.SPLIT))
        other = rng.choice([name for name in shapes.COLOURS if name != colour])
        return (
            Image.open(published.file).convert("RGB"),
            f"Is there a {colour} {shape} in the image?",
            f"Is there a {other} {shape} in the image?",
        )
    if category == "OCR":
        text, other = rng.sample(assets.words(pictures.SPLIT), 2)
        return (
            pictures.typeset(rng, text),
            f'Is the word in the picture "{text}"?',
            f'Is the word in the picture "{other}"?',
        )
    picture, first, second = pictures.sum_of_digits(rng)
    return (
        picture,
        f"Is the answer to the arithmetic question in the image {first + second}?",
        f"Is the answer to the arithmetic question in the image {first + second + rng.choice((-1, 1))}?",
    )


MME_CATEGORIES = ("existence", "count", "position", "color", "OCR", "numerical_calculation")


def pairs(rng: random.Random, count: int):
    for number in range(count // 2):
        category = MME_CATEGORIES[number % len(MME_CATEGORIES)]
        picture, *asked = _pair(rng, category)
        name = f"{category}/{number:04d}.png"
        for turn, (question, answer) in enumerate(zip(asked, ("Yes", "No"))):
            common = {"question": f"{question} Please answer yes or no.", "answer": answer, "category": category}
            yield (
                {"question_id": name, "image": picture, **common},
                {"index": 2 * number + turn, "image": picture, **common, "image_path": name},
            )


# --- several images ---------------------------------------------------------------------------------------------------


def exams(rng: random.Random, count: int):
    """MMMU's form: subjects, choices and open questions, one or two images named in the text."""
    for number in range(count):
        open_question = number % 4 == 3
        if number % 2:
            (one, first), (two, second) = (pictures.handwritten(rng, rng.randint(1, 3)) for _ in range(2))
            shown, subject, total = [one, two], "Math", int(first) + int(second)
            question, answer = "What is the sum of <image 1> and <image 2>?", str(total)
            options = _shuffled(rng, answer, [str(total + step) for step in rng.sample((-10, -3, -1, 1, 2, 7, 20), 3)])
        else:
            chart, picture = pictures.chart(rng)
            shown, subject = [picture], "Economics" if number % 3 else "Accounting"
            asked, right = _by_hand(rng, chart)
            while right in ("Yes", "No"):
                asked, right = _by_hand(rng, chart)
            question, answer = f"<image 1> {asked}", right
            options = _shuffled(rng, right, [f"{float(right) + step:g}" for step in rng.sample((1, 5, 11, 24, 60), 3)])
        answer = answer if open_question else LETTERS[options[1]]
        listed = [] if open_question else options[0]
        common = {
            "id": f"validation_{subject}_{number}",
            "question": question,
            "answer": answer,
            "question_type": "open" if open_question else "multiple-choice",
        }
        images = {f"image_{place}": shown[place - 1] if place <= len(shown) else None for place in range(1, 8)}
        yield (
            {
                **common,
                "options": str(listed),
                "explanation": "",
                **images,
                "img_type": "['Diagrams']",
                "topic_difficulty": "Easy",
                "subfield": "stand-in",
            },
            {
                "index": number,
                "image": shown,
                **common,
                **dict(zip(LETTERS, listed)),
                "category": subject,
                "split": "validation",
            },
        )


STANDINS: tuple[StandIn, ...] = (
    StandIn(
        "docvqa_val", "docvqa_val", "DocVQA_VAL", 40, documents, "rendered forms with unseen words and fonts; ANLS"
    ),
    StandIn(
        "infovqa_val",
        "infovqa_val",
        "InfoVQA_VAL",
        40,
        posters,
        "posters of drawings by unseen artists and figures; ANLS",
    ),
    StandIn(
        "chartqa_test",
        "chartqa_test",
        "ChartQA_TEST",
        40,
        chart_questions,
        "charts of unseen tables; questions on several bars (human), from templates (augmented); relaxed accuracy",
    ),
    StandIn(
        "ocrbench",
        "ocrbench",
        "OCRBench",
        60,
        reading,
        "unseen words, handwriting, random letters, forms, in all ten categories; accuracy",
    ),
    StandIn("ai2d_test", "ai2d_test", "AI2D_TEST", 40, diagrams, "labelled diagrams; four options"),
    StandIn(
        "mmbench_dev_en",
        "mmbench_dev_en",
        "MMBench_DEV_EN",
        64,
        rotations,
        "drawings, shapes, words and charts, each in four rotations; circular accuracy",
    ),
    StandIn("mme", "mme", "MME", 48, pairs, "pairs of questions in six categories; accuracy and points"),
    StandIn(
        "mmmu_dev_val",
        "mmmu_val",
        "MMMU_DEV_VAL",
        40,
        exams,
        "choices and open questions with one or two pictures; accuracy",
    ),
)
