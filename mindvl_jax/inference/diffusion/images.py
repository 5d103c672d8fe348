"""Images of given classes from a class-conditional flow model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mindvl_jax.inference.diffusion.solvers import (
    Solver,
    Table,
    guided,
    noise_levels,
    solve,
    table,
    trailing_times,
)
from mindvl_jax.models.dit.model import DiT
from mindvl_jax.models.dit.processor import from_patches
from mindvl_jax.objectives.paths import STRAIGHT, Path


@functools.lru_cache(maxsize=8)
def _program(solver: Solver, path: Path, steps: int, shift: float, guidance: float):
    times = noise_levels(steps, shift) if path.straight else trailing_times(steps)
    rows = table(solver, path, times)
    return jax.jit(functools.partial(_generate, rows=rows, guidance=guidance))


def _generate(
    model: DiT, labels_B: jax.Array, numbers_B: jax.Array, key: jax.Array, *, rows: Table, guidance: float
) -> jax.Array:
    config = model.config
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B)
    noise = jax.vmap(lambda one: jax.random.normal(one, (config.tokens, config.patch_dim), jnp.float32))(key_B)
    predict = guided(model.velocity, labels_B, jnp.full_like(labels_B, model.no_class), guidance)
    return solve(predict, noise, rows, key_B=key_B)


def generate(
    model: DiT,
    labels: Sequence[int],
    *,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 2.0,
    shift: float = 1.0,
    batch: int = 250,
    path: Path = STRAIGHT,
    solver: Solver | None = None,
) -> np.ndarray:
    """(n, height, width, channels) uint8 images of the classes given.

    Image k follows from the seed, k and its class alone: `batch`, how many are made at a time, changes nothing.

    Args:
      path: that the model was trained on. shift: of straight paths.
      solver: see `solvers.table`; default: euler on a straight path, ddim on another.

    Raises:
      ValueError: a label that is no class of the model; a solver that does not follow the path.
    """
    program = _program(solver or ("euler" if path.straight else "ddim"), path, steps, shift, guidance)
    classes = len(model.config.classes)
    if wrong := sorted({label for label in labels if not 0 <= label < classes}):
        raise ValueError(f"labels {wrong} are not in 0 .. {classes - 1}")
    made = []
    for start in range(0, len(labels), batch):
        # The last batch is filled up, so that one program serves all.
        part = np.resize(np.asarray(labels[start : start + batch], np.int32), batch)
        numbers = np.arange(start, start + batch, dtype=np.int32)
        patches = program(model, part, numbers, jax.random.key(seed))
        made.append(np.asarray(patches)[: len(labels) - start])
    pixels = np.clip(np.rint((np.concatenate(made) + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return from_patches(pixels, model.config)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """One image of all images, row by row with a border of one pixel; missing ones are black."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    page = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        page[top : top + height, left : left + width] = image
    return page
