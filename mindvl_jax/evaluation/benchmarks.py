"""The benchmarks: what is asked, with which words, and how it is scored.

Prompts are the defaults of lmms-eval's task files.

Each entry reads both published forms of its file; columns that differ between the two are handled where they are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import foreign
from mindvl_jax.evaluation import choices, scorers
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.readers import Picture64, Row, read_rows, spelled_list

WORD_OR_PHRASE = "\nAnswer the question using a single word or phrase."
SINGLE_WORD = "\nAnswer the question with a single word."
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
INSTRUCTIONS = (WORD_OR_PHRASE, SINGLE_WORD, LETTER_DIRECTLY)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      title: as people know it. metric: what its main score is called.
      files: stems of published files, tried in order with .parquet and .tsv.
      columns: what a row must have. read: row -> item. rule: (item, answer) -> scores by name, the main one first.
      summarise: (items, scores of each) -> main score and further figures; the default is the mean, and means by
        category.
    """

    title: str
    metric: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    read: Callable[[Row, int], Item]
    rule: Callable[[Item, str], dict[str, float]]
    summarise: Callable[[Sequence[Item], Sequence[dict[str, float]]], dict[str, Any]] | None = None
    max_new_tokens: int = 32
    group: Callable[[Item], str] = lambda item: item.id

    def score(self, item: Item, prediction: str) -> dict[str, float]:
        """Scores by name, the main one first.

        White space around an answer never counts, as in lmms-eval (`Task.process_results`).
        """
        return self.rule(item, prediction.strip())


def _ask(text: str, pictures: int = 1) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": "<image>" * pictures + text},)


def _id(row: Row, number: int, *columns: str) -> str:
    return next((str(row.values[column]) for column in columns if column in row.values), str(number))


def _item(row: Row, number: int, prompt: str, answers: Sequence[str], *ids: str, category: str = "", **extra) -> Item:
    if not row.images:
        raise UserError(
            "the row has no image; files whose images lie elsewhere (image_path alone) must carry them inside"
        )
    # A benchmark's own <image> in a question would claim an image: images come first, in order.
    prompt = prompt.replace("<image>", "").replace("<video>", "")
    return Item(
        id=_id(row, number, *ids, "index"),
        messages=_ask(prompt, len(row.images)),
        images=row.images,
        answers=tuple(answers),
        category=category,
        extra=extra,
    )


# --- answers in free text
# ----------------------------------------------------------------------------------------------


def _document(row: Row, number: int) -> Item:
    return _item(
        row,
        number,
        row.text("question") + WORD_OR_PHRASE,
        row.list("answers" if "answers" in row.values else "answer"),
        "questionId",
    )


def _chart(row: Row, number: int) -> Item:
    kind = str(row.get("type", row.get("split", "")))
    category = "human" if "human" in kind else "augmented" if "augmented" in kind else ""
    return _item(row, number, row.text("question") + SINGLE_WORD, row.list("answer"), category=category)


def _chart_scores(item: Item, prediction: str) -> dict[str, float]:
    answer = item.answers[0]
    return {
        "relaxed_accuracy": scorers.relaxed_accuracy(prediction, answer),
        "relaxed_accuracy_swapped": scorers.relaxed_accuracy_swapped(prediction, answer),
    }


def _ocr(row: Row, number: int) -> Item:
    category = str(row.get("question_type", row.get("category", "")))
    formula = row.get("dataset") == "HME100k" or category == "Handwritten Mathematical Expression Recognition"
    return _item(row, number, row.text("question").strip(), row.list("answer"), category=category, formula=formula)


def _text_vqa(row: Row, number: int) -> Item:
    return _item(
        row,
        number,
        row.text("question").capitalize() + WORD_OR_PHRASE,
        row.list("answers" if "answers" in row.values else "answer"),
        "question_id",
    )


# --- yes or no
# ---------------------------------------------------------------------------------------------------------


def _mme(row: Row, number: int) -> Item:
    category = row.text("category")
    question = row.text("question").strip().replace(" Please answer yes or no.", "") + WORD_OR_PHRASE
    # The two questions about one image make a pair.
    pair = str(row.get("question_id", row.get("image_path", ""))) or hashlib.sha256(_bytes(row.images[0])).hexdigest()
    return dataclasses.replace(
        _item(row, number, question, [row.text("answer")], category=category, pair=f"{category}/{pair}"),
        id=f"{_id(row, number, 'question_id', 'index')}#{number}",
    )


def _bytes(image: Any) -> bytes:
    return image.read() if isinstance(image, Picture64) else image


def _mme_scores(item: Item, prediction: str) -> dict[str, float]:
    return {"accuracy": float(scorers.yes_or_no(prediction) == item.answers[0].lower().strip().replace(".", ""))}


MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _mme_summary(items: Sequence[Item], scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """MME's points: a category gives up to 100 for single questions and up to 100 for pairs that are wholly right."""
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, score in zip(items, scores, strict=True):
        pairs[item.category][item.extra["pair"]].append(score["accuracy"])
    points = {}
    for category, of_category in pairs.items():
        single = sum(sum(pair) / len(pair) for pair in of_category.values())
        whole = sum(min(pair) for pair in of_category.values())
        points[category] = round(100 * (single + whole) / len(of_category), 2)
    perception = sum(value for category, value in points.items() if category not in MME_COGNITION)
    cognition = sum(points.values()) - perception
    return {
        "mme_points": round(perception + cognition, 2),
        "mme_perception": round(perception, 2),
        "mme_cognition": round(cognition, 2),
        "mme_points_by_category": points,
        "mme_incomplete_pairs": sum(len(pair) != 2 for group in pairs.values() for pair in group.values()),
    }


# --- options
# -----------------------------------------------------------------------------------------------------------


def _options(row: Row) -> list[str]:
    """Texts of the options: a list, text that spells one, or columns A, B, C ..."""
    if "options" in row.values:
        options = row.values["options"]
        listed = spelled_list(options) if isinstance(options, str) else options
        if not isinstance(listed, (list, tuple)):
            raise UserError(f"{row.where}: options are {str(listed)[:80]!r}; expected a list")
        return [str(option) for option in listed]
    return [
        str(row.values[letter])
        for letter in choices.LETTERS[:9]
        if letter in row.values and str(row.values[letter]) != "nan"
    ]


def _lines(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(choices.LETTERS, options))


def _ai2d(row: Row, number: int) -> Item:
    options, answer = _options(row), row.text("answer")
    letter = choices.LETTERS[int(answer)] if answer.isdigit() else answer
    return _item(
        row, number, f"{row.text('question')}\n{_lines(options)}\n{LETTER_DIRECTLY}", [letter], options=options
    )


def _mmbench(row: Row, number: int) -> Item:
    options = {
        letter: str(row.values[letter])
        for letter in choices.LETTERS[:5]
        if letter in row.values and str(row.values[letter]) != "nan"
    }
    hint = row.get("hint")
    listed = "There are several options:\n" + "\n".join(f"{letter}. {text}" for letter, text in options.items())
    question = (
        f"{hint} " if hint not in (None, "nan") else ""
    ) + f"{row.text('question')} {listed}\n\n{LETTER_DIRECTLY}"
    # The circular form repeats a question with its options rotated under index + 1,000,000 k.
    original = str(int(float(row.text("index"))) % 1_000_000)
    four = {letter: text for letter, text in options.items() if letter in "ABCD"}
    return _item(
        row,
        number,
        question,
        [row.text("answer")],
        category=str(row.get("category", "")),
        options=four,
        original=original,
    )


def _mmbench_summary(items: Sequence[Item], scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Circular accuracy: a question counts only if it is right in every rotation that the file has."""
    groups: dict[str, list[float]] = defaultdict(list)
    for item, score in zip(items, scores, strict=True):
        groups[item.extra["original"]].append(score["accuracy"])
    return {
        "circular_accuracy": round(sum(min(group) for group in groups.values()) / len(groups), 4),
        "questions": len(groups),
    }


def _mmmu(row: Row, number: int) -> Item:
    question, answers = row.text("question"), row.list("answer")
    options = _options(row) if "options" in row.values or "A" in row.values else []
    is_choice = row.get("question_type", "multiple-choice" if options else "open") == "multiple-choice"
    prompt = f"{question}\n{_lines(options)}\n\n{LETTER_DIRECTLY}" if is_choice else f"{question}\n{WORD_OR_PHRASE}"
    # Images that the question or its options name, each once and in order; the rest (of the solution) is left out.
    named = sorted({int(number) for number in re.findall(r"<image (\d+)>", prompt)})
    images = tuple(row.images[index - 1] for index in named if index <= len(row.images)) or row.images[:1]
    name = re.match(r"[a-z]+_(.+?)_\d+$", str(row.get("id", "")))
    category = name.group(1) if name else str(row.get("category", ""))
    item = _item(
        dataclasses.replace(row, images=images),
        number,
        prompt,
        answers,
        "id",
        category=category,
        options=options if is_choice else None,
    )
    return dataclasses.replace(item, extra=item.extra | {"split": str(row.get("split", ""))})


def _mmmu_scores(item: Item, prediction: str) -> dict[str, float]:
    if item.extra["options"] is None:
        return {"accuracy": scorers.mmmu_open(prediction, item.answers)}
    return {"accuracy": float(choices.mmmu_option(prediction, item.extra["options"]) in item.answers)}


def _real_world(row: Row, number: int) -> Item:
    question = row.text("question").strip()
    options = _options(row)
    return _item(
        row,
        number,
        f"{question}\n{_lines(options)}\n{LETTER_DIRECTLY}" if options else question,
        [row.text("answer").strip()],
    )


def _real_world_scores(item: Item, prediction: str) -> dict[str, float]:
    answer = item.answers[0]
    if answer.upper() in ("A", "B", "C", "D"):
        return {"accuracy": float(choices.telling_letter(prediction, ("A", "B", "C", "D")) == answer.upper())}
    return {"accuracy": float(prediction.lower().strip().rstrip(".") == answer.lower())}


def _anls(item, prediction):
    return {"anls": scorers.anls(prediction, item.answers)}


BENCHMARKS: dict[str, Benchmark] = {
    "docvqa_val": Benchmark(
        "DocVQA", "anls", ("docvqa_val", "DocVQA_VAL", "docvqa"), ("question", "answers|answer"), _document, _anls
    ),
    "infovqa_val": Benchmark(
        "InfographicVQA",
        "anls",
        ("infovqa_val", "InfoVQA_VAL", "infovqa"),
        ("question", "answers|answer"),
        _document,
        _anls,
    ),
    "chartqa_test": Benchmark(
        "ChartQA",
        "relaxed_accuracy",
        ("chartqa_test", "ChartQA_TEST", "chartqa"),
        ("question", "answer", "type|split"),
        _chart,
        _chart_scores,
        max_new_tokens=16,
    ),
    "ocrbench": Benchmark(
        "OCRBench",
        "accuracy",
        ("ocrbench", "OCRBench"),
        ("question", "answer", "question_type|category"),
        _ocr,
        lambda item, prediction: {
            "accuracy": scorers.ocrbench_match(prediction, item.answers, formula=item.extra["formula"])
        },
        max_new_tokens=128,
    ),
    "mme": Benchmark(
        "MME",
        "accuracy",
        ("mme", "MME"),
        ("question", "answer", "category"),
        _mme,
        _mme_scores,
        _mme_summary,
        max_new_tokens=16,
        group=lambda item: item.extra["pair"],
    ),
    "mmbench_dev_en": Benchmark(
        "MMBench (English, dev)",
        "accuracy",
        ("mmbench_dev_en", "MMBench_DEV_EN", "mmbench_en_dev", "mmbench"),
        ("index", "question", "answer", "A", "B"),
        _mmbench,
        lambda item, prediction: {
            "accuracy": float(choices.mmbench_option(prediction, item.extra["options"]) in item.answers)
        },
        _mmbench_summary,
        max_new_tokens=64,
        group=lambda item: item.extra["original"],
    ),
    "ai2d_test": Benchmark(
        "AI2D",
        "accuracy",
        ("ai2d_test", "AI2D_TEST", "ai2d"),
        ("question", "answer", "options|A"),
        _ai2d,
        lambda item, prediction: {"accuracy": float(choices.same_option(prediction, item.answers[0]))},
        max_new_tokens=16,
    ),
    "mmmu_dev_val": Benchmark(
        "MMMU (dev and val)",
        "accuracy",
        ("mmmu_dev_val", "MMMU_DEV_VAL", "mmmu_val", "mmmu"),
        ("question", "answer"),
        _mmmu,
        _mmmu_scores,
        max_new_tokens=128,
    ),
    "textvqa_val": Benchmark(
        "TextVQA",
        "vqa_accuracy",
        ("textvqa_val", "TextVQA_VAL", "textvqa"),
        ("question", "answers|answer"),
        _text_vqa,
        lambda item, prediction: {"vqa_accuracy": scorers.vqa_accuracy(prediction, item.answers)},
        max_new_tokens=16,
    ),
    "realworldqa": Benchmark(
        "RealWorldQA",
        "accuracy",
        ("realworldqa", "RealWorldQA"),
        ("question", "answer"),
        _real_world,
        _real_world_scores,
        max_new_tokens=16,
    ),
}


STANDINS_MARK = "standins.json"
"""Marks a folder of stand-ins (`examples.quickstart.standins`): their scores are not the benchmarks'."""


def open_task(name: str, folder: Path) -> tuple[Benchmark, list[Item]]:
    """A benchmark with its items; called a stand-in where the folder says that its files are.

    Raises UserError as `load_items`.
    """
    benchmark = find_benchmark(name)
    if (folder / STANDINS_MARK).is_file():
        benchmark = dataclasses.replace(benchmark, title=f"{benchmark.title} (stand-in)")
    return benchmark, load_items(name, folder)


def question_alone(item: Item) -> Item:
    """The question without the benchmark's instruction, for models that know few words; options stay, with `Answer A,
    B, C or D.`
    """
    *before, last = item.messages
    text = last["content"].replace(" There are several options:\n", "\n")
    for instruction in INSTRUCTIONS:
        text = text.removesuffix(instruction).rstrip("\n")
    if re.search(r"^B\. ", text, re.MULTILINE):
        last_letter = max(re.findall(r"^([A-I])\. ", text, re.MULTILINE))
        listed = choices.LETTERS[: choices.LETTERS.index(last_letter) + 1]
        text += f"\nAnswer {', '.join(listed[:-1])} or {listed[-1]}."
    return dataclasses.replace(item, messages=(*before, {**last, "content": text}))


def find_benchmark(name: str) -> Benchmark:
    """Raise UserError for an unknown name, with the nearest one."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.3)
    raise UserError(
        f"there is no task {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known are {', '.join(BENCHMARKS)}"
    )


def find_file(name: str, folder: Path) -> Path:
    """The benchmark's file (or folder of parquet parts) below `folder`. Raises UserError when there is none."""
    benchmark = find_benchmark(name)
    for stem in benchmark.files:
        for suffix in (".parquet", ".tsv"):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
        if any(not foreign(file.name) for file in (folder / stem).glob("*.parquet")):
            return folder / stem
    wanted = ", ".join(f"{stem}.parquet, {stem}.tsv" for stem in benchmark.files[:2])
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
    raise UserError(
        f"{name}: no file of {benchmark.title} in {folder} ({held or 'empty'}); expected one of {wanted}, or "
        f"a folder {benchmark.files[0]}/ with parquet parts"
    )


def find_files(name: str, folder: Path) -> list[Path]:
    """The benchmark's file, or the parts of its folder in order. Raises UserError as `find_file`."""
    path = find_file(name, folder)
    return sorted(file for file in path.glob("*.parquet") if not foreign(file.name)) if path.is_dir() else [path]


def load_items(name: str, folder: Path) -> list[Item]:
    """All items of a benchmark.

    Raises:
      UserError: unknown task, no file, missing columns, rows that cannot be read, or two rows with one id.
    """
    benchmark, path = find_benchmark(name), find_file(name, folder)
    items: list[Item] = []
    for file in find_files(name, folder):
        for row in read_rows(file, benchmark.columns):
            try:
                item = benchmark.read(row, len(items))
                if not any(answer.strip() for answer in item.answers):
                    raise UserError(f"{row.where}: the row has no answer to compare with")
                items.append(item)
            except (ValueError, KeyError, IndexError, SyntaxError, TypeError, OverflowError, AttributeError) as error:
                raise UserError(str(error) if str(error).startswith(row.where) else f"{row.where}: {error}") from error
    counts: dict[str, int] = defaultdict(int)
    for item in items:
        counts[item.id] += 1
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise UserError(
            f"{path}: {len(repeated)} ids occur more than once ({', '.join(repeated[:5])}); predictions are "
            "kept by id, so each row needs its own"
        )
    return items
