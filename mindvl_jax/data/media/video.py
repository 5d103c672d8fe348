"""Video through PyAV: which frames are taken, at which size, and their pixels.

Frames are sampled evenly at `fps`, at most `max_frames`, always an even count (a temporal patch covers two frames).
The seconds between two frame pairs go into the rotary positions.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.media import image as images
from mindvl_jax.data.media import files as media_files
from mindvl_jax.data.sample import Media, SampleError

LONGEST_FRAMES = 200_000  # above an hour at 50 frames a second: cut the file first


@dataclasses.dataclass(frozen=True)
class VideoPlan:
    """Frames to take and their layout: grid (frame pairs, height, width) in patches, seconds from one pair to the next."""

    frames: tuple[int, ...]
    grid: tuple[int, int, int]
    seconds_per_pair: float


def plan_frames(media: Media, vision: PatchGeometry, *, fps: float, max_frames: int, min_pixels: int, max_pixels: int, limit_patches: int | None = None, total_patches: int | None = None) -> VideoPlan:
    """Which frames of a video are read and how large, from its header (counting packets where the header has no count).

    `limit_patches` bounds one frame pair, `total_patches` the whole video: frames shrink until both hold.
    Raises SampleError for what is not a video, has no frame, or too many.
    """
    with _opened(media) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        total = int(stream.frames or 0)
        if total <= 0:
            total = sum(1 for packet in container.demux(stream) if packet.size)
    if not width or not height or total <= 0:
        raise SampleError("undecodable", f"{media_files.name(media)} has no frames ({total} frames of {width}x{height})")
    if total > LONGEST_FRAMES:
        raise SampleError("too_large", f"{media_files.name(media)} has {total} frames, more than {LONGEST_FRAMES}; cut it")
    if width * height > images.LARGEST_PIXELS:
        raise SampleError("too_large", f"{media_files.name(media)} has frames of {width}x{height}")
    rate = rate if 0 < rate < 1000 else 25.0
    pair = vision.temporal_patch_size
    wanted = max(pair, min(max_frames, math.ceil(total / rate * fps)))
    wanted = min(wanted, total) if total >= pair else wanted
    wanted = max(pair, wanted // pair * pair)
    frames = tuple(np.round(np.linspace(0, total - 1, wanted)).astype(int).tolist())
    if total_patches is not None:
        limit_patches = min(limit_patches or total_patches, total_patches // (wanted // pair))
    _, rows, columns = images.image_grid(height, width, vision, min_pixels=min_pixels, max_pixels=max_pixels, limit_patches=limit_patches)
    # One frame only: it is shown twice, like a picture.
    taken_per_second = wanted / (total / rate)
    return VideoPlan(frames, (wanted // pair, rows, columns), pair / taken_per_second)


def read_frames(media: Media, frames: tuple[int, ...], grid: tuple[int, int, int], vision: PatchGeometry, resample: str) -> np.ndarray:
    """(frames, height, width, 3) uint8 pixels at the size of the grid. A file that ends early repeats its last frame once at most.

    Raises SampleError when it does not decode, or when more than one frame pair is missing at its end.
    """
    wanted = set(frames)
    last = max(frames)
    found: dict[int, np.ndarray] = {}
    with _opened(media) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = images.resize_to_grid(Image.fromarray(frame.to_ndarray(format="rgb24")), grid, vision, resample)
            if number >= last:
                break
    missing = [number for number in frames if number not in found]
    if not found or len(missing) > vision.temporal_patch_size:
        raise SampleError("undecodable", f"{media_files.name(media)} ends early: {len(missing)} of the {len(frames)} frames that its header promises are missing")
    # Counts in headers are often one too high: the last frame that there is stands in.
    final = found[max(found)]
    return np.stack([found.get(number, final) for number in frames])


class _opened:
    """Opens a video for reading; every error of the decoder becomes a SampleError."""

    def __init__(self, media: Media):
        self._media = media

    def __enter__(self) -> tuple[Any, Any]:
        import av  # here, because it loads all of FFmpeg and most runs have no video

        data = media_files.read_bytes(self._media)
        try:
            self._container = av.open(io.BytesIO(data), mode="r")
        except Exception as error:
            raise self._refusal(error) from None
        if not self._container.streams.video:
            self._container.close()
            raise SampleError("undecodable", f"{media_files.name(self._media)} has no video stream")
        return self._container, self._container.streams.video[0]

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._container.close()
        if error is not None and isinstance(error, Exception) and not isinstance(error, SampleError):
            raise self._refusal(error) from None

    def _refusal(self, error: BaseException) -> SampleError:
        return SampleError("undecodable", f"{media_files.name(self._media)} does not decode as a video: {type(error).__name__}: {str(error)[:200]}")
