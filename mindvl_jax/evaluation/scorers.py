"""Metrics: one function each, from 0 to 1 for one sample.

Every rule is written out from the benchmark's own publication or the evaluation code that the field uses (named at each
function), because two tools that "both compute ANLS" disagree in exactly these details.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, up to white space; letter case and punctuation count."""
    return float(_squeeze(prediction) in {_squeeze(answer) for answer in answers})


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA and InfoVQA (Biten et al. 2019): best over the answers, 0
    below the threshold.

    Case and white space do not count for the distance; the length that it is divided by is that of the strings as
    given, as in lmms-eval and VLMEvalKit.
    """
    best = 1.0
    for answer in answers:
        length = max(len(answer), len(prediction))
        distance = Levenshtein.distance(_squeeze(answer.lower()), _squeeze(prediction.lower()))
        best = min(best, distance / length if length else 0.0)
    similarity = 1 - best
    return similarity if similarity >= threshold else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answer: str, *, tolerance: float = 0.05) -> float:
    """ChartQA (Masry et al. 2022): a number may be off by 5 % of the answer; anything else must match but for case.

    An answer of 0 has no relative error and is compared as text, as in lmms-eval.
    """
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is not None and wanted:
        return float(abs(predicted - wanted) / abs(wanted) <= tolerance)
    return float(prediction.lower() == answer.lower())


def relaxed_accuracy_swapped(prediction: str, answer: str) -> float:
    """The same relative to the prediction (arguments exchanged), as VLMEvalKit and MindSpeed-MM report it."""
    return relaxed_accuracy(answer, prediction)


def ocrbench_match(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """OCRBench (Liu et al. 2023): 1 when an answer occurs in the prediction; full-width letters count as plain ones,
    case does not matter.

    Args:
      formula: handwritten formulas (data set HME100k): blanks are dropped and case does count.
    """
    if formula:

        def clean(text):
            return "".join(text.strip().replace("\n", " ").split(" "))
    else:

        def clean(text):
            return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")

    return float(any(clean(answer) in clean(prediction.strip()) for answer in answers))


_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def yes_or_no(prediction: str) -> str:
    """MME's reading of an answer: `yes`, `no` or `other`, by the whole answer or its first four characters."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015) as used by TextVQA: over all ways to leave one annotator out, min(1, matches /
    3).
    """
    given = [vqa_normal_form(answer) for answer in answers]
    predicted = vqa_normal_form(prediction)
    matches = given.count(predicted)
    return sum(min(1.0, (matches - (answer == predicted)) / 3) for answer in given) / len(given)


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
# The evaluation server puts apostrophes back; every form lacks exactly one of them.
_VQA_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in [
        "'ow's'at",
        "'twas",
        "I'd've",
        "I'm",
        "I've",
        "ain't",
        "aren't",
        "can't",
        "could've",
        "couldn't",
        "couldn't've",
        "didn't",
        "doesn't",
        "don't",
        "hadn't",
        "hadn't've",
        "hasn't",
        "haven't",
        "he'd",
        "he'd've",
        "he's",
        "how'd",
        "how'll",
        "how's",
        "isn't",
        "it'd",
        "it'd've",
        "it'll",
        "ma'am",
        "might've",
        "mightn't",
        "mightn't've",
        "must've",
        "mustn't",
        "needn't",
        "not've",
        "o'clock",
        "oughtn't",
        "shan't",
        "she'd've",
        "should've",
        "shouldn't",
        "shouldn't've",
        "somebody'd've",
        "somebody'll",
        "somebody's",
        "someone'd",
        "someone'd've",
        "someone'll",
        "someone's",
        "something'd",
        "something'd've",
        "something'll",
        "that's",
        "there'd",
        "there'd've",
        "there're",
        "there's",
        "they'd",
        "they'd've",
        "they'll",
        "they're",
        "they've",
        "wasn't",
        "we'd've",
        "we've",
        "weren't",
        "what'll",
        "what're",
        "what's",
        "what've",
        "when's",
        "where'd",
        "where's",
        "where've",
        "who'd",
        "who'd've",
        "who'll",
        "who's",
        "who've",
        "why'll",
        "why're",
        "why's",
        "won't",
        "would've",
        "wouldn't",
        "wouldn't've",
        "y'all",
        "y'all'd've",
        "y'all'll",
        "you'd",
        "you'd've",
        "you'll",
        "you're",
        "you've",
    ]
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normal_form(text: str) -> str:
    """An answer as the VQA evaluation server compares it: lower case, without punctuation and articles, numbers as
    digits.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _VQA_PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,+\d", text)
        plain = plain.replace(mark, "" if beside_blank else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_VQA_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def mmmu_open(prediction: str, answers: Sequence[str]) -> float:
    """MMMU (Yue et al. 2023), open questions: the clause that states the result, and every number in it, against the
    answers.

    Numbers compare after rounding to two decimals; a text answer must occur in the stated result.
    """
    wanted = [form for answer in answers for form in _mmmu_forms(answer)]
    for candidate in _mmmu_candidates(prediction):
        if isinstance(candidate, str):
            if any(isinstance(form, str) and form in candidate for form in wanted):
                return 1.0
        elif candidate in wanted:
            return 1.0
    return 0.0


_MMMU_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _mmmu_candidates(prediction: str) -> list[str | float]:
    whole = prediction.strip().strip(".").lower()
    # Lower case leaves nothing for a rule about sentences that begin with a capital: lines are the units.
    clauses = whole.split("\n")
    stated = []
    for number, clause in enumerate(clauses):
        signs = _MMMU_SIGNS + (("=",) if number == len(clauses) - 1 else ())  # the last line may be an equation
        shortest = ""
        for tail in (clause.split(sign)[-1].strip() for sign in signs if sign in clause):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in {
            ":",
            ",",
            ".",
            "!",
            "?",
            ";",
            "'",
        }:  # a clause that ends with its sign states nothing
            stated.append(shortest)
    stated = stated or [whole]
    numbers = [number for text in stated for pattern in _MMMU_NUMBERS for number in re.findall(pattern, text)]
    return [form for text in stated + numbers for form in _mmmu_forms(text)]


def _mmmu_forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return (
            [f" {text}", f"{text} "] if len(text) == 1 else [text]
        )  # a single letter would occur in nearly every word
