"""The error of unusable weights, and reading JSON files that raises it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.core.errors import UserError, shortened
from mindvl_jax.core.files import read_text


class WeightsError(UserError):
    """A folder of weights that cannot be used; the message lists every problem found."""


def listed(problems: Sequence[str], most: int = 40) -> list[str]:
    """Lines of an error that gathers many problems: the first ones, shortened, and how many more there are."""
    lines = [f"  {shortened(problem, 400)}" for problem in problems[:most]]
    return lines + ([f"  and {len(problems) - most} more"] if len(problems) > most else [])


def finite(value: np.ndarray) -> bool:
    """Whether an array of floats, of NumPy's own kinds or of ml_dtypes, holds no NaN and no infinity."""
    return value.dtype.kind in "iub" or bool(np.isfinite(value).all())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      WeightsError: unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
