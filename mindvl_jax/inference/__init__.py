"""Generate text: `Generator` turns `Request`s with `Sampling` settings into `Answer`s.

Names are imported on first use, so that a help text does not load jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Answer": "request",
    "Generator": "generator",
    "Piece": "generator",
    "Request": "request",
    "Sampling": "request",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
