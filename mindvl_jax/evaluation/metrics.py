"""Metrics by name for one's own tasks, and metrics that a user writes in Python."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindvl_jax.config.base import file_name
from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation import scorers
from mindvl_jax.evaluation.items import Item

Rule = Callable[[Item, str], dict[str, float]]


def _best(function: Callable[[str, str], float]) -> Callable[[Item, str], float]:
    """Score against the answer that fits best."""
    return lambda item, prediction: max(function(prediction, answer) for answer in item.answers)


METRICS: dict[str, Callable[[Item, str], float]] = {
    "exact_match": lambda item, prediction: scorers.exact_match(prediction, item.answers),
    "exact_match_any_case": lambda item, prediction: scorers.exact_match(
        prediction.lower().rstrip("."), [answer.lower().rstrip(".") for answer in item.answers]
    ),
    "contains": lambda item, prediction: scorers.ocrbench_match(prediction, item.answers),
    "anls": lambda item, prediction: scorers.anls(prediction, item.answers),
    "relaxed_accuracy": _best(scorers.relaxed_accuracy),
    "vqa_accuracy": lambda item, prediction: scorers.vqa_accuracy(prediction, item.answers),
    "yes_no": lambda item, prediction: float(scorers.yes_or_no(prediction) == scorers.yes_or_no(item.answers[0])),
}
"""Metrics that a task of one's own can name. Each goes from 0 to 1 for one sample."""


def parse_task(text: str) -> tuple[str, str, str]:
    """Return (name, path, metric) of `NAME=PATH[:METRIC]`; METRIC is a name of METRICS or `FILE.py:FUNCTION`.

    Raises:
      UserError: no name or path.
    """
    name, _, rest = text.partition("=")
    if not name.strip() or not rest.strip():
        raise UserError(
            f"--tasks {text!r}: expected NAME=FILE or NAME=FILE:METRIC; metrics are {', '.join(METRICS)}, or "
            "FILE.py:FUNCTION"
        )
    try:
        file_name(name.strip())
    except ValueError as error:
        raise UserError(f"--tasks {text!r}: {error}") from None
    if hook := re.fullmatch(r"(.+?):([^:]+\.py:\w+)", rest):
        return name.strip(), hook[1], hook[2]
    if named := re.fullmatch(r"(.+):([a-z_0-9]+)", rest):
        return name.strip(), named[1], named[2]
    return name.strip(), rest.strip(), "exact_match"


def rule_of(metric: str) -> tuple[str, Rule]:
    """Return (name of the main score, rule) of a metric.

    A function of `FILE.py:FUNCTION` is called with (prediction, answers) and returns a number from 0 to 1, or a mapping
    of scores whose first is the main one.

    Raises:
      UserError: an unknown metric, or a file without that function.
    """
    if metric in METRICS:
        return metric, lambda item, prediction: {metric: METRICS[metric](item, prediction)}
    if ".py:" not in metric:
        near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
        raise UserError(
            f"there is no metric {metric!r}{f'; did you mean {near[0]!r}?' if near else ''} Known are "
            f"{', '.join(METRICS)}; or name a function as FILE.py:FUNCTION"
        )
    path, _, name = metric.rpartition(":")
    function = _function(Path(path).expanduser(), name)

    def rule(item: Item, prediction: str) -> dict[str, float]:
        return _scores(function(prediction, list(item.answers)), name, metric, item)

    return name, rule


def _function(path: Path, name: str) -> Callable[[str, list[str]], Any]:
    if not path.is_file():
        raise UserError(f"metric {path}:{name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"mindvl_metric_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"metric {path}: cannot be loaded ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"metric {path}:{name}: the file has no function {name!r} (it has: {known or 'none'})")
    return function


def _scores(value: Any, name: str, metric: str, item: Item) -> dict[str, float]:
    scores = value if isinstance(value, dict) else {name: value}
    try:
        numbers = {str(key): float(number) for key, number in scores.items()}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers or not all(0 <= number <= 1 for number in numbers.values()):
        raise UserError(
            f"metric {metric}: sample {item.id} got {value!r}; expected a number from 0 to 1, or a mapping "
            "of names to such numbers"
        )
    # The main score goes by the function's name, whatever the mapping calls it.
    first = next(iter(numbers.values()))
    return {name: first} | numbers
