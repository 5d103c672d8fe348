"""The error of unusable weights, and reading JSON files that raises it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_text


class WeightsError(UserError):
    """A folder of weights that cannot be used; the message lists every problem found."""


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
