"""Published weights in and out, on any mesh.

Attributes are imported on first use: reading a folder's config.json must not load jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "OpenedModel": "resolve",
    "WeightsError": "errors",
    "load_parameters": "load",
    "open_model": "resolve",
    "save_parameters": "save",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
