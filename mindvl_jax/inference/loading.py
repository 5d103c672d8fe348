"""Open a model for inference, with the image sizes that a resolution search chose for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvl_jax.checkpoints.names import run_folder
from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.core.errors import UserError

SETTINGS = "inference.json"
"""In a model's folder: `{"min_pixels": ..., "max_pixels": ...}`, written by a resolution search."""


def open_for_inference(folder: str | Path, *, mesh: str | None = None, adapter: str | None = None):
    """The model of a folder (see `weights.open_model`) with the folder's own inference settings.

    Args:
      mesh: devices as `data=2,fsdp=2,tensor=2`; None is the default device. adapter: PEFT folder to use on top.

    Raises:
      UserError: no usable model, no tokenizer, or invalid settings or mesh.
    """
    from mindvl_jax.weights.resolve import add_adapter, open_model

    opened = open_model(folder, mesh=parse_mesh(mesh) if mesh else None)
    if adapter is not None:
        opened = add_adapter(opened, adapter)
    if opened.tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer.json, so there is no text to read or write; save the tokenizer "
            "beside the weights"
        )
    path = run_folder(folder) / SETTINGS
    if not path.is_file():
        return opened
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pixels = {key: int(content[key]) for key in ("min_pixels", "max_pixels") if content.get(key) is not None}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} must be a JSON object with min_pixels and max_pixels: {error}") from None
    return dataclasses.replace(opened, **pixels)


def named_adapters(values: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """(folder of the one adapter that answers everything or None, folders by name) of `--adapter` options.

    Raises:
      UserError: a plain folder beside others, or a name twice.
    """
    named: dict[str, str] = {}
    plain = [value for value in values if "=" not in value or Path(value).is_dir()]
    for value in values:
        if value in plain:
            continue
        name, _, folder = value.partition("=")
        if not name or name in named:
            raise UserError(f"--adapter {value}: {'the name is there twice' if name else 'no name before ='}")
        named[name] = folder
    if plain and len(values) > 1:
        raise UserError(f"--adapter {plain[0]} has no name; of several adapters each wants one: --adapter NAME=DIR")
    return (plain[0] if plain else None), named


def with_adapters(opened: Any, folders: Mapping[str, str]) -> dict[str, Any]:
    """Models by name, each the opened one (of `open_model`) with another PEFT folder on top; all share its arrays.

    Raises:
      UserError: a folder does not fit the model.
    """
    from flax import nnx

    from mindvl_jax.weights.resolve import add_adapter

    return {
        name: add_adapter(dataclasses.replace(opened, model=nnx.clone(opened.model)), folder)
        for name, folder in folders.items()
    }


MESH_AXES = ("data", "fsdp", "tensor")
"""Axes that generation spreads over; places of a row (context) and experts are spread in training alone."""


def parse_mesh(text: str):
    """Parse `data=2,tensor=4` to a mesh. Raises UserError."""
    from mindvl_jax.parallel.mesh import make_mesh

    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in MESH_AXES or not size.strip().lstrip("-").isdigit():
            raise UserError(
                f"--mesh {text!r}: expected AXIS=SIZE pairs such as data=2,tensor=4; axes are {', '.join(MESH_AXES)}"
            )
        sizes[axis.strip()] = int(size)
    return make_mesh(MeshConfig(**sizes))
