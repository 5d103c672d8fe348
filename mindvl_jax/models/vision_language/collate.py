"""Planned rows of examples to the arrays of a batch.

B rows, T token positions, P patch positions a row; see `mindvl_jax.models.vision_language.batch` for every field.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.processor import PackedBatch
from mindvl_jax.models.vision_language.batch import Batch, BatchShape
from mindvl_jax.models.vision_language.example import Example


def batch_shape(config: Config, phase: PhaseConfig) -> BatchShape:
    """Static sizes of a phase's global batch (rows of one micro-step over all processes)."""
    return shape_for(
        config.model.vision,
        rows=phase.rows,
        tokens=phase.sequence_length,
        patches=phase.patches_per_row,
        samples=phase.max_samples_per_row,
        min_pixels=phase.min_pixels,
    )


def shape_for(
    vision: PatchGeometry, *, rows: int, tokens: int, patches: int, samples: int, min_pixels: int = 0
) -> BatchShape:
    """A batch shape whose image and window counts can hold whatever fits the patches.

    An image never has fewer merged tokens than `min_pixels` asks for, which bounds images and windows a row.
    """
    smallest = max(1, -(-min_pixels // vision.pixels_per_token**2))
    images = max(1, patches // (vision.merge_unit * smallest))
    windows = (
        images
        if vision.window_tokens is None
        else max(1, int(patches * _windows_per_patch(smallest, vision.window_tokens, vision.merge_unit)))
    )
    return BatchShape(
        rows=rows,
        tokens=tokens,
        patches=patches,
        samples=samples,
        images=images,
        windows=windows,
        patch_dim=vision.patch_dim,
    )


@functools.lru_cache(maxsize=256)
def _windows_per_patch(smallest_tokens: int, window: int, merge_unit: int) -> float:
    """Most attention windows a patch over all grids of at least that many merged tokens."""
    side = np.arange(1, 2 * max(smallest_tokens, window) + 1)[:, None].astype(np.float64)
    other = np.maximum(np.arange(1, 2 * window + 2), 1)[None].astype(np.float64)
    side = np.maximum(side, np.ceil(smallest_tokens / other))
    return float((np.ceil(side / window) * np.ceil(other / window) / (side * other)).max() / merge_unit)


def visual_budgets(tokens: int, patches: int, samples: int, images: int, windows: int) -> Budgets:
    """Room of one row; tokens and patches are to be filled."""
    return Budgets(
        ("tokens", "patches", "samples", "images", "windows"),
        (tokens, patches, samples, images, windows),
        filled=("token", "patch"),
    )


def budgets_of(shape: BatchShape) -> Budgets:
    return visual_budgets(shape.tokens, shape.patches, shape.samples, shape.images, shape.windows)


def size_of(example: Example) -> tuple[int, int, int, int, int]:
    """Return an example's use of each budget, in the order of `visual_budgets`."""
    return example.length, example.patches, 1, len(example.image_lengths), len(example.window_lengths)


def collate(
    rows: Sequence[Sequence[Example]],
    shape: BatchShape,
    *,
    pad_id: int,
    vision: PatchGeometry,
    patches: np.ndarray | None = None,
) -> PackedBatch:
    """Write each row's examples one after another. `shape.rows` must be the number of rows given.

    Pixels must have been read (`Example.with_pixels`), or be given as `patches` (B, P, patch_dim), already in place.
    Raises ValueError when a row is over a budget.
    """
    if len(rows) != shape.rows:
        raise ValueError(f"{len(rows)} rows for a batch of {shape.rows}")
    batch = (
        shape.empty()
        if patches is None
        else dataclasses.replace(shape, patches=0)
        .empty()
        .replace(
            patches=patches,
            patch_positions=np.zeros((shape.rows, shape.patches, 2), np.int32),
            patch_segment_ids=np.zeros((shape.rows, shape.patches), np.int32),
            patch_window_ids=np.zeros((shape.rows, shape.patches), np.int32),
        )
    )
    if pad_id:
        batch.tokens[:] = pad_id
    caps = budgets_of(shape).array()
    for index, row in enumerate(rows):
        if not row:
            continue
        used = np.sum([size_of(example) for example in row], axis=0)
        if (used > caps).any():
            raise ValueError(
                f"row {index} needs {used.tolist()} (tokens, patches, samples, images, windows), the budgets "
                f"are {caps.tolist()}: {[example.id for example in row]}"
            )
        _write_row(batch, index, row, vision)
        if patches is None:
            _write_patches(batch.patches[index], row, vision)
    return PackedBatch(batch, tuple(tuple(example.id for example in row) for row in rows))


def write_text(batch: Batch, index: int, row: Sequence[Example]) -> np.ndarray:
    """Write the fields of a row that text fills, one example after another; return the examples' lengths."""
    lengths = np.array([example.length for example in row])
    T = int(lengths.sum())
    batch.tokens[index, :T] = np.concatenate([example.tokens for example in row])
    batch.targets[index, :T] = np.concatenate([example.targets for example in row])
    batch.loss_weights[index, :T] = np.concatenate([example.loss_weights for example in row])
    batch.segment_ids[index, :T] = np.repeat(np.arange(1, len(row) + 1), lengths)
    batch.source_ids[index, :T] = np.repeat([example.source for example in row], lengths)
    batch.positions[index, :, :T] = np.concatenate([example.positions for example in row], axis=1)
    batch.segment_lengths[index, : len(row)] = lengths
    return lengths


def _write_row(batch: Batch, index: int, row: Sequence[Example], vision: PatchGeometry) -> None:
    lengths = write_text(batch, index, row)
    groups = np.array([example.patches for example in row]) // vision.merge_unit
    T, P = int(lengths.sum()), int(groups.sum()) * vision.merge_unit
    if P == 0:
        return
    visual = np.concatenate([example.visual_index for example in row])
    first_group = np.repeat(np.cumsum(groups) - groups, lengths)
    batch.visual_index[index, :T] = np.where(visual >= 0, visual + first_group, -1)
    batch.patch_positions[index, :P] = np.concatenate([example.patch_positions for example in row])
    images = np.concatenate([example.image_lengths for example in row])
    windows = np.concatenate([example.window_lengths for example in row])
    batch.patch_segment_ids[index, :P] = np.repeat(np.arange(1, len(images) + 1), images)
    batch.patch_window_ids[index, :P] = np.repeat(np.arange(1, len(windows) + 1), windows)
    batch.image_lengths[index, : len(images)] = images
    batch.window_lengths[index, : len(windows)] = windows


def _write_patches(place: np.ndarray, row: Sequence[Example], vision: PatchGeometry) -> None:
    cursor = 0
    for example in row:
        if example.pixels is None:
            raise ValueError(f"the pixels of sample {example.id!r} have not been read")
        for pixels in example.pixels:
            write_pixels(place[cursor : cursor + len(pixels)], pixels, vision)
            cursor += len(pixels)


def write_pixels(place: np.ndarray, pixels: np.ndarray, vision: PatchGeometry) -> None:
    """Write a medium's patches to their positions, (P_i, patch_dim).

    An image's one frame fills both frames of a patch, its one channel all channels when it has no colour.
    """
    area = vision.patch_size**2
    channels = 1 if pixels.shape[1] == area else vision.in_channels
    place.reshape(-1, vision.in_channels, vision.temporal_patch_size, area)[:] = pixels.reshape(
        len(pixels), channels, -1, area
    )


def pack_prompts(
    examples: Sequence[Example],
    *,
    vision: PatchGeometry,
    pad_id: int,
    rows: int | None = None,
    tokens: int | None = None,
    patches: int | None = None,
    resample: str = "bicubic",
) -> PackedBatch:
    """One prompt a row, for inference.

    Sizes default to what the longest prompt needs; rows without a prompt are padding.

    Raises SampleError when an image does not decode, ValueError when a prompt is longer than the sizes given.
    """
    read = [example.with_pixels(vision, resample) for example in examples]
    longest = max((example.length for example in read), default=1)
    most = max([vision.merge_unit, *(example.patches for example in read)])
    shape = shape_for(
        vision,
        rows=rows or len(read),
        tokens=tokens or longest,
        patches=patches if patches is not None else most,
        samples=1,
    )
    return collate(
        [[example] for example in read] + [[] for _ in range(shape.rows - len(read))],
        shape,
        pad_id=pad_id,
        vision=vision,
    )
