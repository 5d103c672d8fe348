"""Rotary positions of a sample's tokens: one running index, or the three rows of M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# (first token, grid in patches, seconds between frame pairs or None for an image)
VisualSpan = tuple[int, tuple[int, int, int], float | None]


def rotary_positions(
    length: int, spans: Sequence[VisualSpan], *, merge: int, tokens_per_second: int | None, mrope: bool
) -> np.ndarray:
    """(3, T) int32 positions (temporal, height, width) of one sample, starting at 0.

    Text counts on in all three rows. A visual span starts at the next position p: row `height` and `width` are p plus
    the merged row and column; `temporal` is p plus floor(frame pair * tokens_per_second * seconds), 0 for images; plus
    the frame pair alone when `tokens_per_second` is None, as in Qwen2-VL. The text after it goes on from p + max(rows,
    columns), whatever the time spanned: the published Qwen2.5-VL index. Without `mrope` every row is the running index.
    """
    if not mrope or not spans:
        return np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
    positions = np.empty((3, length), np.int32)
    cursor = current = 0
    for start, (frames, height, width), seconds in spans:
        positions[:, cursor:start] = current + np.arange(start - cursor)
        current += start - cursor
        rows, columns = height // merge, width // merge
        # The published index multiplies in float32; a float64 product can floor differently.
        step = np.float32(
            0.0
            if seconds is None
            else 1.0
            if tokens_per_second is None
            else np.float32(tokens_per_second) * np.float32(seconds)
        )
        time = (np.arange(frames, dtype=np.float32) * step).astype(np.int32)
        block = positions[:, start : start + frames * rows * columns].reshape(3, frames, rows, columns)
        block[0] = current + time[:, None, None]
        block[1] = current + np.arange(rows)[:, None]
        block[2] = current + np.arange(columns)
        cursor = start + frames * rows * columns
        current += max(rows, columns)
    positions[:, cursor:] = current + np.arange(length - cursor)
    return positions
