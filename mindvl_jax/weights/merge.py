"""Fold a PEFT adapter into a Hugging Face folder, file by file, and check that the logits stay.

Every weight file is read, changed and written under its own name, so host memory holds one file and its result.
Everything else of the folder (tokenizer, processor, index) is copied.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.adapters import attach_values
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.batch import BatchShape
from mindvl_jax.weights.adapters import PeftAdapter, published_updates, read_adapter
from mindvl_jax.weights.errors import finite
from mindvl_jax.weights.folder import WeightsFolder
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import mapping_of, read_config


def merge_folder(base: Path, folder: Path, out: Path) -> int:
    """Write `base` with the adapter of `folder` folded in to `out`; returns the number of merged matrices.

    W + s B A (and DoRA's rescaling) is computed in float32 and rounded once to the dtype of the file.

    Raises:
      UserError: the adapter does not fit the base (see `read_adapter`); damaged base files; quantised base weights.
    """
    config = read_config(base)
    adapter = read_adapter(folder, config)
    mapping = mapping_of(config)
    files = WeightsFolder(base, mapping)  # checks every header, so that a damaged file stops the work before it begins
    updates = published_updates(adapter, config)
    absent = sorted(name for name in updates if f"{name}.weight" not in files.entries)
    if absent:
        raise UserError(
            f"{base}: the adapter changes {absent[0]}.weight"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + ", which the base does not have"
        )
    out.mkdir(parents=True, exist_ok=True)
    weight_files = sorted({entry.file for entry in files.entries.values()})
    for path in sorted(base.iterdir()):
        if path.is_file() and path not in weight_files and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    for path in weight_files:
        tensors = {}
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a file handle, no dict)
                value = file.get_tensor(name)
                update = updates.get(mapping.canonical(name).removesuffix(".weight"))
                tensors[name] = value if update is None else update.merged(value)
                if not finite(tensors[name]):
                    raise UserError(
                        f"{path}: {name} {'holds' if update is None or not finite(value) else 'gets, merged,'} values "
                        "that are NaN or infinite; the weights are damaged, or too large for their dtype"
                    )
            save_file(tensors, out / path.name, metadata=dict(file.metadata() or {}))
    return len(updates)


@dataclasses.dataclass(frozen=True)
class LogitsCheck:
    """Largest difference of logits between base with adapter and merged, and the largest logit, in the dtype of the
    files.
    """

    difference: float
    largest: float
    dtype: str

    @property
    def limit(self) -> float:
        """Of difference / largest.

        Float32 differs by the order of sums; smaller dtypes by the one rounding of each merged matrix.
        """
        return {"float32": 1e-4}.get(self.dtype, 0.1)

    @property
    def equal(self) -> bool:
        return self.difference <= self.limit * self.largest


def check_merged(base: Path, folder: Path, merged: Path) -> LogitsCheck:
    """Compare logits of one random batch (text, and an image for a vision tower); one model is in memory at a time."""
    config = read_config(base)
    before = _logits(base, config, read_adapter(folder, config))
    after = _logits(merged, config, None)
    dtype = WeightsFolder(merged, mapping_of(config)).entries["model.embed_tokens.weight"].dtype
    return LogitsCheck(float(np.max(np.abs(before - after))), float(np.max(np.abs(before))), dtype)


def _logits(folder: Path, config, adapter: PeftAdapter | None) -> np.ndarray:
    """Logits (tokens, V) of `probe`, computed in float32 with the stored weights."""
    config = config.model_copy(update=dict(compute_dtype="float32"))
    model = outline_of(config).merge(load_parameters(folder, config))
    if adapter is not None:
        attach_values(model, adapter.layout, adapter.parameters)
    graph, state = nnx.split(model, nnx.Param)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_run(graph, state, jax.tree.map(jnp.asarray, probe(config)))[0])


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph, state, batch) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.logits(model(batch))


def probe(config, tokens: int = 24, seed: int = 0):
    """One row of random tokens, with a small image in it for a model with a vision tower."""
    rng = np.random.default_rng(seed)
    vision = getattr(config, "vision", None)
    unit, patch_dim = (vision.merge_unit, vision.patch_dim) if vision else (4, 1176)
    batch = BatchShape(1, tokens, 4 * unit, samples=1, images=1, windows=4, patch_dim=patch_dim).empty()
    batch.tokens[:] = rng.integers(0, min(config.text.vocab_size, 32000), batch.tokens.shape)
    batch.segment_ids[:] = 1
    batch.positions[:] = np.arange(tokens)
    if vision:
        side = vision.spatial_merge_size
        batch.visual_index[0, 2:6] = range(4)
        batch.patches[0] = rng.integers(0, 256, batch.patches.shape[1:])
        batch.patch_segment_ids[:] = batch.patch_window_ids[:] = 1
        groups = [
            (2 * side * 0 + y + side * (g // 2), x + side * (g % 2))
            for g in range(4)
            for y in range(side)
            for x in range(side)
        ]
        batch.patch_positions[0] = groups
    return batch
