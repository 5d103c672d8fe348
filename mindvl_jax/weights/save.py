"""Our parameters as a published folder: the inverse of `load`, tensor by tensor.

Host memory holds one shard file. A parameter that is spread over devices comes back a layer at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.weights.folder import INDEX, SINGLE
from mindvl_jax.weights.mapping import Slot, config_content, mapping_of, slots

SHARD_BYTES = 5 * 10**9
"""Largest weight file, as transformers chooses it."""
METADATA = {"format": "pt"}


def save_parameters(
    folder: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, jax.Array],
    *,
    dtype=None,
    shard_bytes: int = SHARD_BYTES,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Write config.json and the weights; existing weight files of the folder are replaced.

    Args:
      parameters: by path, as `load_parameters` returns them, on any mesh. In a run of several processes every process
        must call this (gathering is a collective); the first one writes.
      dtype: of the files; None keeps each parameter's own.

    Raises:
      UserError: parameters that do not belong to `config`.
    """
    folder = Path(folder)
    shapes = {path: tuple(value.shape) for path, value in parameters.items()}
    try:
        all_slots = list(slots(config, shapes))
    except KeyError as error:
        raise UserError(f"the parameters lack {error.args[0]}, which the configuration asks for") from error
    by_name = {slot.name: slot for slot in all_slots}
    all_slots += [
        dataclasses.replace(by_name[original], name=copy)
        for copy, original in mapping_of(config).copies(config).items()
    ]
    unknown = set(shapes) - {path for slot in all_slots for path in slot.rule.ours}
    if unknown:
        raise UserError(f"parameters that have no published name: {', '.join(sorted(unknown))}")
    kinds = {
        path: jnp.dtype(dtype) if dtype is not None else np.dtype(value.dtype) for path, value in parameters.items()
    }
    sizes = {
        slot.name: int(np.prod(slot.shape, dtype=np.int64)) * kinds[slot.rule.ours[0]].itemsize for slot in all_slots
    }
    groups = _group(all_slots, sizes, shard_bytes)
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )

    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
    for name, group in zip(names, groups, strict=True):
        tensors = {slot.name: _published(slot, parameters, kinds) for slot in group}
        if writes:
            save_file(tensors, folder / name, metadata=METADATA)
    if writes:
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {slot.name: name for name, group in zip(names, groups) for slot in group},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        stored = kinds[all_slots[0].rule.ours[0]].name
        content = config_content(config, stored, pad_token_id=pad_token_id, eos_token_id=eos_token_id)
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _group(all_slots: list[Slot], sizes: Mapping[str, int], limit: int) -> list[list[Slot]]:
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in all_slots:
        if groups[-1] and filled + sizes[slot.name] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += sizes[slot.name]
    return groups


def _published(slot: Slot, parameters: Mapping[str, jax.Array], kinds: Mapping[str, np.dtype]) -> np.ndarray:
    arrays = [
        _gather(parameters[path][slot.index] if slot.index else parameters[path]).astype(kinds[path], copy=False)
        for path in slot.rule.ours
    ]
    return slot.rule.form.to_published(arrays)


def _gather(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
