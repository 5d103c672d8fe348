"""Question-and-answer records (VQA files, CSV rows, instruction data) as conversations.

{"image": "cat.png", "question": "What is it?", "answer": "A cat."}
{"instruction": "Translate.", "input": "chat", "output": "cat"}
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from mindvl_jax.config.schema import ColumnMapping
from mindvl_jax.data.marks import IMAGE, VIDEO, marks
from mindvl_jax.data.sample import SampleError

QUESTIONS = ("question", "instruction", "prompt", "query")
ANSWERS = ("answer", "answers", "output", "response", "label")
# Fields that would be part of the question. How a data set words them is its own, so they are refused, not guessed.
REFUSED = ("options", "choices", "hint", "context")

ACCEPTED = (
    '{"image": "cat.png", "question": "What is it?", "answer": "A cat."}',
    '{"images": ["cat.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": '
    '"assistant", "content": "A cat."}]}',
    '{"image": "cat.png", "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": '
    '"gpt", "value": "A cat."}]}',
)
"""A line of each accepted shape, for messages."""


def accepted_lines() -> str:
    """Return the end of a message about records that have none of these shapes."""
    return "\nLines that are accepted:\n  " + "\n  ".join(ACCEPTED)


def with_turns(record: Mapping[str, Any], columns: ColumnMapping) -> dict[str, Any] | None:
    """Return the record with a question and an answer as `messages`, or None when it has no question.

    Images and videos without a mark in the question come before it, as `mindvl generate` puts them. Of several answers
    the most frequent is learned; all are kept for scoring. A record without any answer ends with its question.

    Raises:
      SampleError: two questions or answers, or a field that would be part of the question.
    """
    asked = _one(record, (columns.question, *QUESTIONS))
    if asked is None:
        return None
    for name in REFUSED:
        if record.get(name) not in (None, "", [], {}):
            raise SampleError(
                "unsupported_field",
                f"the record has {name!r} beside its question; write it into the question, in the words that "
                "the model shall see",
            )
    if not isinstance(asked[1], str):
        raise SampleError("malformed", f"{asked[0]!r} must be text, found {type(asked[1]).__name__}")
    question = asked[1]
    if asked[0] == "instruction" and isinstance(record.get("input"), str) and record["input"]:
        question += "\n" + record["input"]
    found = _one(record, (columns.answer, *ANSWERS))
    answers = _answers(*found) if found else []
    if not marks(question):
        question = _marks(record, columns) + question
    turns = [{columns.role: columns.user, columns.content: question}]
    if answers:
        turns.append(
            {columns.role: columns.assistant, columns.content: collections.Counter(answers).most_common(1)[0][0]}
        )
    rest = {
        name: value
        for name, value in record.items()
        if name not in (asked[0], "input", *((found[0],) if found else ()))
    }
    return {**rest, columns.messages: turns, "answers": answers}


def _one(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any] | None:
    """The field that holds something; two of them say different things or one of them would be dropped."""
    found = [name for name in dict.fromkeys(names) if record.get(name) not in (None, "", [])]
    if names[0] in found and names[0] not in names[1:]:
        found = [names[0]]  # a column that the source names is the one
    if len(found) > 1 and found != ["answer", "answers"]:
        raise SampleError(
            "malformed",
            f"the record has {' and '.join(map(repr, found))}; keep one, or name it in columns.question or "
            "columns.answer",
        )
    return (found[-1], record[found[-1]]) if found else None


def _answers(name: str, value: Any) -> list[str]:
    listed = value if isinstance(value, (list, tuple)) else [value]
    texts = [
        entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed
    ]  # VQAv2: {"answer": ..., "answer_confidence": ...}
    for text in texts:
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise SampleError("malformed", f"{name!r} must be text or a list of texts, found {type(text).__name__}")
    return [str(text) for text in texts]


def _marks(record: Mapping[str, Any], columns: ColumnMapping) -> str:
    def count(*names):
        return next(
            (
                len(value) if isinstance(value := record[name], (list, tuple)) else 1
                for name in names
                if record.get(name) not in (None, "", [])
            ),
            0,
        )

    return IMAGE * count(columns.images, "image") + VIDEO * count(columns.videos, "video")
