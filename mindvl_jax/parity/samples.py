"""Samples for comparisons: token ids and normalised pixels, as transformers takes them and as a packed batch of ours.

T tokens, P patches of one sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.data.marks import MEDIA_TOKENS
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.layers.qwen_vl_reference import rope_index
from mindvl_jax.models.vision_language.batch import Batch, BatchShape

IMAGE, VIDEO = 1, 2  # transformers' mm_token_type_ids


@dataclasses.dataclass(frozen=True)
class Visual:
    """One image or video: grid (frame pairs, height, width) in patches, pixels (P, patch_dim) in published order."""

    kind: int
    grid: tuple[int, int, int]
    pixels: np.ndarray
    seconds: float = 1.0  # between frame pairs


@dataclasses.dataclass(frozen=True)
class ParitySample:
    """Token ids with placeholders, visuals in order, and the mask of learned positions.

    Attributes:
      tokens: (T,) int. learned: (T,) bool, whether a place's own token counts as a target.
    """

    tokens: np.ndarray
    visuals: tuple[Visual, ...]
    learned: np.ndarray


def random_sample(config: ModelConfig, rng: np.random.Generator, *pieces, answer: int = 4) -> ParitySample:
    """A sample of random ids and pixels.

    Args:
      pieces: an int is so many text tokens; ("image", (t, h, w)) or ("video", (t, h, w), seconds) is a visual.
      answer: learned tokens at the end.
    """
    text = config.text
    special = (
        ()
        if not hasattr(config, "vision")
        else [token for key in MEDIA_TOKENS if (token := getattr(config, key)) is not None]
    )
    vocabulary = np.setdiff1d(np.arange(3, text.vocab_size), special)
    tokens: list[int] = []
    visuals: list[Visual] = []
    for piece in (*pieces, answer):
        if isinstance(piece, int):
            tokens += rng.choice(vocabulary, piece).tolist()
            continue
        name, grid, *seconds = piece
        kind = {"image": IMAGE, "video": VIDEO}[name]
        pixels = rng.standard_normal((int(np.prod(grid)), config.vision.patch_dim)).astype(np.float32)
        visuals.append(Visual(kind, grid, pixels, *seconds))
        tokens += visual_tokens(config, kind, grid, time=rng.choice(vocabulary, 2).tolist())
    learned = np.zeros(len(tokens), bool)
    learned[-answer:] = True
    return ParitySample(np.array(tokens), tuple(visuals), learned)


def visual_tokens(config: ModelConfig, kind: int, grid: tuple[int, int, int], time: Sequence[int] = ()) -> list[int]:
    """Borders and placeholders of one image or video. `time` stands before each frame pair where the family says so."""
    place = config.image_token_id if kind == IMAGE else config.video_token_id
    parts = grid[0] if kind == VIDEO and config.vision.frame_text else 1
    count = int(np.prod(grid)) // config.vision.merge_unit // parts
    before = time if parts > 1 else ()
    borders = [[] if token is None else [token] for token in (config.vision_start_token_id, config.vision_end_token_id)]
    return [*before, *borders[0], *[place] * count, *borders[1]] * parts


def reference_inputs(sample: ParitySample, config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of a transformers model for one sample, batch of one."""
    ids = torch.tensor(sample.tokens)[None]
    labels = torch.where(torch.tensor(sample.learned)[None], ids, -100)
    inputs: dict[str, Any] = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    if not hasattr(config, "vision"):
        return inputs
    vision = config.vision
    if vision.image_side is not None:
        if sample.visuals:
            pixels = np.concatenate([visual.pixels for visual in sample.visuals])
            inputs["pixel_values"] = torch.tensor(_squares(pixels, vision))
        return inputs
    inputs["mm_token_type_ids"] = torch.where(
        ids == config.image_token_id, IMAGE, torch.where(ids == config.video_token_id, VIDEO, 0)
    ).int()
    for kind, pixels_name, grid_name in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [visual for visual in sample.visuals if visual.kind == kind]
        if chosen:
            inputs[pixels_name] = torch.tensor(np.concatenate([visual.pixels for visual in chosen]))
            inputs[grid_name] = torch.tensor([visual.grid for visual in chosen])
    if VIDEO in {visual.kind for visual in sample.visuals}:
        inputs["second_per_grid_ts"] = torch.tensor(
            [visual.seconds for visual in sample.visuals if visual.kind == VIDEO]
        )
    return inputs


def _squares(pixels: np.ndarray, vision: PatchGeometry) -> np.ndarray:
    """(squares, channels, side, side) of patches in merged order."""
    side, merge, patch = vision.image_side // vision.patch_size, vision.spatial_merge_size, vision.patch_size
    split = pixels.reshape(-1, side // merge, side // merge, merge, merge, vision.in_channels, patch, patch)
    return split.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, vision.in_channels, *[vision.image_side] * 2)


def _layout(visual: Visual, vision: PatchGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of merged groups in window order, patches of each window, (h, w) of each patch in published order."""
    grid = torch.tensor([visual.grid])
    if vision.window_size is None:
        frames, height, width = visual.grid
        return (
            np.arange(len(visual.pixels) // vision.merge_unit),
            np.full(frames, height * width),
            get_vision_position_ids(grid, vision.spatial_merge_size).numpy(),
        )
    order, bounds = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return order.numpy(), np.diff(bounds.numpy()), get_vision_position_ids(grid, vision.spatial_merge_size).numpy()


def pack(
    rows: Sequence[Sequence[ParitySample]],
    config: ModelConfig,
    reference,
    *,
    tokens: int,
    patches: int = 0,
    samples: int = 8,
) -> Batch:
    """Rows of samples as a batch, laid out with transformers' own window index and rotary positions.

    Args:
      tokens, patches: positions of a row; the rest is padding. samples: most samples of a row.
    """
    vision = getattr(config, "vision", None)
    merge, patch_dim = (vision.merge_unit, vision.patch_dim) if vision else (4, 4)
    # At least one merged group: the arrays of a row are never empty.
    shape = BatchShape(
        len(rows),
        tokens,
        max(patches, merge),
        samples=samples,
        images=64,
        windows=max(patches, merge),
        patch_dim=patch_dim,
    )
    batch = shape.empty()
    batch = batch.replace(patches=np.zeros(batch.patches.shape, np.float32))
    for b, row in enumerate(rows):
        t = p = images = windows = 0
        for number, sample in enumerate(row, 1):
            T = len(sample.tokens)
            here = slice(t, t + T)
            batch.tokens[b, here] = sample.tokens
            batch.targets[b, t : t + T - 1] = sample.tokens[1:]
            batch.loss_weights[b, t : t + T - 1] = sample.learned[1:]
            batch.segment_ids[b, here] = number
            batch.segment_lengths[b, number - 1] = T
            inputs = reference_inputs(sample, config)
            if vision is None or config.text.rope == "1d":
                batch.positions[b, :, here] = np.arange(T)
            else:
                batch.positions[b, :, here] = rope_index(
                    reference, inputs["input_ids"], inputs["mm_token_type_ids"], inputs
                )[:, 0].numpy()
            places = (
                np.flatnonzero(
                    np.isin(sample.tokens, [config.image_token_id, config.video_token_id or config.image_token_id])
                )
                + t
                if vision
                else np.zeros(0, int)
            )
            for visual in sample.visuals:
                order, window_lengths, positions = _layout(visual, vision)
                P = len(visual.pixels)
                in_windows = (order[:, None] * merge + np.arange(merge)).reshape(-1)
                there = slice(p, p + P)
                batch.patches[b, there] = visual.pixels[in_windows]
                batch.patch_positions[b, there] = positions[in_windows]
                frame = P // visual.grid[0]
                batch.patch_segment_ids[b, there] = images + 1 + np.arange(P) // frame
                batch.image_lengths[b, images : images + visual.grid[0]] = frame
                batch.patch_window_ids[b, there] = (
                    windows + 1 + np.repeat(np.arange(len(window_lengths)), window_lengths)
                )
                batch.window_lengths[b, windows : windows + len(window_lengths)] = window_lengths
                # Token k of the visual shows published group k, which lies at position argsort(order)[k] in window
                # order.
                batch.visual_index[b, places[: P // merge]] = p // merge + np.argsort(order)
                places = places[P // merge :]
                p, images, windows = p + P, images + visual.grid[0], windows + len(window_lengths)
            t += T
    return batch
