"""Parse the option that an answer names. Each benchmark has its own rule, named after it.

An answer that names no option is wrong: no rule here guesses, and none asks another model. (The published MMMU rule
draws a random option instead, which gives a model that says nothing a quarter of the points.)
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

LETTERS = string.ascii_uppercase


def leading_letter(answer: str) -> str:
    """AI2D: the letter of an answer that begins like `B.`, otherwise the answer itself, case and punctuation aside."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return _bare(found.group(1) if found else answer)


def same_option(answer: str, option: str) -> bool:
    """Whether `leading_letter` gives the option's letter (AI2D's exact match without case and punctuation)."""
    return leading_letter(answer) == _bare(option)


def _bare(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


# --- MMBench
# -----------------------------------------------------------------------------------------------------------

_WRAPPINGS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def mmbench_option(answer: str, options: Mapping[str, str]) -> str:
    """MMBench's rules without a judge, in order: a single option letter as a word of its own, bare or wrapped in one
    kind of punctuation; the only option whose text occurs in the answer; the most telling place of a letter
    (`telling_letter`).

    Returns:
      The letter, or an empty string.
    """
    words = answer.split()
    letters = LETTERS[:5]
    if sum(letter in words for letter in letters) == 1 and not (
        "A" in words and len(words) > 3
    ):  # a lone A in a sentence is an article
        return next(letter for letter in letters if letter in words)
    for before, after in _WRAPPINGS:
        wrapped = [letter for letter in letters if before + letter + after in words]
        if len(wrapped) == 1:
            return wrapped[0]
    named = [letter for letter, text in options.items() if str(text).lower() in answer.lower()]
    return named[0] if len(named) == 1 else telling_letter(answer, sorted(options))


# --- RealWorldQA, and MMBench where nothing else decides
# -----------------------------------------------------------------

_PHRASES = (
    "answer is",
    "choice is",
    "correct option is",
    "best option is",
    "i choose",
    "i select",
    "i pick",
    "옵션",
    "정답은",
    "답은",
    "답:",
    "答案是",
    "答案为",
    "选",
    "答えは",
)


def telling_letter(answer: str, letters: Sequence[str]) -> str:
    """The letter in the most telling place: alone at the start, alone at the end, after words like "the answer is", in
    parentheses, before a period, colon, parenthesis or blank; the last one among equals; any occurrence when there is
    nothing else.

    Returns:
      The letter, or an empty string.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not text:
        return ""
    padded = f" {text} "
    found: list[tuple[int, int, str]] = []  # (how telling, place, letter)
    stripped = padded.strip()
    for letter in letters:
        if stripped.startswith(letter) and not stripped[1:2].isalpha():
            found.append((10, 0, letter))
        if (stripped.endswith(letter) and not stripped[-2:-1].isalpha()) or stripped == letter:
            found.append((9, len(padded), letter))
        found += [(7, place, letter) for start in _phrase_ends(padded) if (place := padded.find(letter, start)) >= 0]
        for telling, form in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            if form in padded:
                found.append((telling, padded.rfind(form), letter))
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    best = max(found, key=lambda entry: entry[:2], default=(0, 0, ""))
    return best[2]


def _phrase_ends(text: str) -> list[int]:
    lowered = text.lower()
    return [place + len(phrase) for phrase in _PHRASES if (place := lowered.find(phrase)) >= 0]


# --- MMMU
# --------------------------------------------------------------------------------------------------------------


def mmmu_option(answer: str, options: Sequence[str]) -> str:
    """MMMU's rule: `(B)`, else `B` before a blank, else `B.`, else (in an answer of more than five words) an option's
    text; the last one where several occur.

    Returns:
      The letter, or an empty string where the published rule would draw one by chance.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) > 5:
        lowered = answer.lower()
        found = [letter for letter, text in zip(letters, options) if text.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(options[letters.index(letter)].lower()))
    return ""
