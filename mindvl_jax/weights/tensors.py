"""Tensors of a part of a diffusers folder, read whole and strictly: every one that is expected, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mindvl_jax.models.hf import Rule, Shape
from mindvl_jax.weights.errors import WeightsError, listed, read_json
from mindvl_jax.weights.mapping import slots_of


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files, as stored.

    Raises:
      WeightsError: no such file, an unreadable one, a name in two files, or an index that names a missing file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no .safetensors file; other formats are not read")
    # Variants such as model.fp16.safetensors hold the same tensors once more.
    plain = [file for file in files if ".fp16" not in file.name and ".bf16" not in file.name]
    for index in folder.glob("*.safetensors.index.json"):
        named = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(str(name) for name in named if not (folder / str(name)).is_file()):
            raise WeightsError(f"{index}: names files that are not there: {', '.join(missing)}")
    tensors: dict[str, np.ndarray] = {}
    for file in plain or files:
        try:
            with safe_open(file, framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    if name in tensors:
                        raise WeightsError(f"{file}: tensor {name} is in another file of the folder too")
                    tensors[name] = np.asarray(opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: cannot be read ({error})") from error
    return tensors


def to_parameters(
    tensors: Mapping[str, Any], rules: Sequence[Rule], like: Mapping[str, jax.ShapeDtypeStruct], where: str
) -> dict[str, np.ndarray]:
    """Our parameters by path, in the dtypes of `like`.

    Raises:
      WeightsError: tensors that are missing, left over or of another shape; all of them at once.
    """
    shapes: dict[str, Shape] = {path: one.shape for path, one in like.items()}
    slots = list(slots_of(rules, shapes))
    known = {slot.name for slot in slots}
    problems = [f"{slot.name}: missing" for slot in slots if slot.name not in tensors]
    problems += [f"{name}: belongs to nothing in this model" for name in tensors if name not in known]
    problems += [
        f"{slot.name}: has shape {tuple(tensors[slot.name].shape)}, expected {slot.shape}"
        for slot in slots
        if slot.name in tensors and tuple(tensors[slot.name].shape) != slot.shape
    ]
    if problems:
        raise WeightsError("\n".join([f"{where}: {len(problems)} problems:", *listed(problems)]))
    params = {path: np.empty(one.shape, one.dtype) for path, one in like.items()}
    for slot in slots:
        for path, value in zip(slot.rule.ours, slot.rule.form.to_ours(tensors[slot.name], slot.shapes), strict=True):
            params[path][slot.index] = value
    return params


def to_published(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The published tensors of our parameters: the inverse of `to_parameters`."""
    arrays = {path: np.asarray(value) for path, value in params.items()}
    return {
        slot.name: np.ascontiguousarray(
            slot.rule.form.to_published([arrays[path][slot.index] for path in slot.rule.ours])
        )
        for slot in slots_of(rules, {path: value.shape for path, value in arrays.items()})
    }


def as_arrays(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Tensors on the device; floats in `dtype`."""
    return {
        name: jnp.asarray(value, dtype if jnp.issubdtype(value.dtype, jnp.floating) else None)
        for name, value in tensors.items()
    }
