"""Blind baseline: for each question text, the most frequent answer in the training data.

`python -m examples.quickstart.blind --data data/quickstart` prints it for every test set. Scores should be read against
it.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from examples.quickstart import assets, samples

Pair = tuple[str, str]


def majority(training: Iterable[Pair]) -> tuple[Mapping[str, str], str]:
    """(most frequent answer by question, most frequent answer of all); the first in the alphabet of equals."""
    by_question: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    overall: collections.Counter = collections.Counter()
    for question, answer in training:
        by_question[question][answer] += 1
        overall[answer] += 1

    def first(counts):
        return min(counts, key=lambda answer: (-counts[answer], answer))

    return {question: first(counts) for question, counts in by_question.items()}, first(overall)


def score(training: Iterable[Pair], test: Sequence[Pair]) -> float:
    """Share of `test` that the majority answer gets right."""
    answers, otherwise = majority(training)
    return sum(answers.get(question, otherwise) == answer for question, answer in test) / len(test)


def scores(folder: Path) -> dict[str, float]:
    """Blind score of each test set of a built folder."""
    result = {}
    for path in sorted((folder / "test").glob("*.parquet")):
        result[path.stem] = round(score(training_pairs(folder, path.stem), _pairs(path)), 4)
    return result


def training_pairs(folder: Path, task: str) -> list[Pair]:
    if task == "easyvqa":
        # All of the published training questions: the file asks some of them, drawn anew for each pass over the images.
        return [pair for picture in assets.shape_pictures("train") for pair in picture.questions]
    return _pairs(folder / "train" / f"{task}.parquet")


def _pairs(path: Path) -> list[Pair]:
    pairs = []
    for row in samples.read_parquet(path, ["messages", "answers"]):
        messages = [(message["role"], message["content"].removeprefix("<image>")) for message in row["messages"]]
        if messages[-1][0] == "user":
            messages.append(("assistant", row["answers"][0]))
        pairs += [(question, answer) for (_, question), (_, answer) in zip(messages[::2], messages[1::2])]
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.blind", description="Prints the blind score of every test set."
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not (options.data / "test").is_dir():
        print(
            f"error: {options.data} holds no built data; build it with python -m examples.quickstart.build "
            f"--out {options.data}",
            file=sys.stderr,
        )
        return 2
    result = scores(options.data)
    print(json.dumps(result) if options.json else "\n".join(f"{task:12} {value:.3f}" for task, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
