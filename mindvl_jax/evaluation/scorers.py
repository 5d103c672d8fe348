"""How an answer is judged: one function a metric, each from 0 to 1 for one sample.

Every rule is written out from the benchmark's own publication or the evaluation code that the field uses (named at each
function), because two tools that "both compute ANLS" disagree in exactly these details.
"""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, up to white space; letter case and punctuation count."""
    return float(_squeeze(prediction) in {_squeeze(answer) for answer in answers})


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions cost one."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA and InfoVQA (Biten et al. 2019): best over the answers, 0 below the threshold.

    Case and white space do not count for the distance; the length that it is divided by is that of the strings as given, as in
    lmms-eval and VLMEvalKit.
    """
    best = 1.0
    for answer in answers:
        length = max(len(answer), len(prediction))
        distance = edit_distance(_squeeze(answer.lower()), _squeeze(prediction.lower()))
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
    """The same with its arguments exchanged, so relative to the prediction: what VLMEvalKit (and MindSpeed-MM) report."""
    return relaxed_accuracy(answer, prediction)
