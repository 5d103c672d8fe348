"""Files to packed batches. Knows nothing of models or devices; see docs/data.md.

Attributes are imported when first used, so that reading a configuration or a help text does not load Grain and Pillow.
"""

from __future__ import annotations

import importlib
from typing import Any

# No name here is a module's too (`collate`): which of the two one got would depend on what was imported before.
_HOMES = {
    "batch_shape": "packing.collate",
    "pack_prompts": "packing.collate",
    "shape_for": "packing.collate",
    "encode_prompt": "example",
    "encode_sample": "example",
    "EncodeLimits": "example",
    "Example": "example",
    "ExampleEncoder": "example",
    "Loader": "loader",
    "make_loader": "loader",
    "training_limits": "loader",
    "Media": "sample",
    "Message": "sample",
    "Sample": "sample",
    "SampleError": "sample",
    "Source": "sources.readers",
    "load_tokenizer": "text.tokenizer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
