"""Names of a folder's tensors, read without jax: what a configuration may ask before anything is opened."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from mindvl_jax.weights.errors import WeightsError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_names(folder: Path) -> set[str] | None:
    """Names of a folder's tensors by its index or the header of its single file; None where they cannot be read, for
    whoever opens the weights then says why.
    """
    try:
        if (folder / INDEX).is_file():
            return set(read_json(folder / INDEX)["weight_map"])
        with safe_open(folder / SINGLE, framework="numpy") as file:
            return set(file.keys())
    except (OSError, KeyError, TypeError, SafetensorError, WeightsError):
        return None
