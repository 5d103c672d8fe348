"""Video through PyAV: which frames are taken, at which size, and their pixels.

Frames are sampled evenly at `fps`, at most `max_frames`, always an even count (a temporal patch covers two frames).
The seconds between two frame pairs go into the rotary positions.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mindvl_jax.data.media import files as media_files
from mindvl_jax.data.media import image as images
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.sample import Media, SampleError

LONGEST_FRAMES = 200_000  # above an hour at 50 frames a second: cut the file first


@dataclasses.dataclass(frozen=True)
class VideoPlan:
    """Frames to take and their layout: grid (frame pairs, height, width) in patches, seconds from one pair to the next,
    the video's own (height, width) in pixels, the time of each pair in seconds (the mean of its first and last frame).
    """

    frames: tuple[int, ...]
    grid: tuple[int, int, int]
    seconds_per_pair: float
    size: tuple[int, int]
    pair_times: tuple[float, ...]


def plan_frames(
    media: Media,
    vision: PatchGeometry,
    *,
    fps: float,
    max_frames: int,
    min_pixels: int,
    max_pixels: int,
    limit_patches: int | None = None,
    total_patches: int | None = None,
) -> VideoPlan:
    """Plan the frames and sizes to read of a video, from its header (counts packets if the header has no count).

    `limit_patches` bounds one frame pair, `total_patches` the whole video: frames shrink until both hold.
    Raises SampleError for what is not a video, has no frame, or too many.
    """
    with _opened(media) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        packets = [packet.pts for packet in container.demux(stream) if packet.size]
        total = int(stream.frames or 0) or len(packets)
        step = float(stream.time_base or 0)
    if not width or not height or total <= 0:
        raise SampleError(
            "undecodable", f"{media_files.name(media)} has no frames ({total} frames of {width}x{height})"
        )
    if total > LONGEST_FRAMES:
        raise SampleError(
            "too_large", f"{media_files.name(media)} has {total} frames, more than {LONGEST_FRAMES}; cut it"
        )
    if width * height > images.LARGEST_PIXELS:
        raise SampleError("too_large", f"{media_files.name(media)} has frames of {width}x{height}")
    with _opened(media) as (container, stream):  # anew, because not every container can be rewound
        first = next(iter(container.decode(stream)), None)
        if first is not None and _transposed(_display(first)):
            width, height = height, width
    times = _uneven(packets, step) if len(packets) == total else None
    if times is None:
        rate = rate if 0 < rate < 1000 else 25.0
        seconds = total / rate
    else:
        seconds = float(times[-1] - times[0]) * total / (total - 1)
    pair = vision.temporal_patch_size
    wanted = max(pair, min(max_frames, math.ceil(seconds * fps)))
    wanted = min(wanted, total) if total >= pair else wanted
    wanted = max(pair, wanted // pair * pair)
    if times is None:
        frames = tuple(np.round(np.linspace(0, total - 1, wanted)).astype(int).tolist())
    else:  # what a player shows at even times
        frames = tuple(
            (np.searchsorted(times, np.linspace(times[0], times[-1], wanted) + step / 2, side="right") - 1).tolist()
        )
    if total_patches is not None:
        limit_patches = min(limit_patches or total_patches, total_patches // (wanted // pair))
    _, rows, columns = images.image_grid(
        height, width, vision, min_pixels=min_pixels, max_pixels=max_pixels, limit_patches=limit_patches
    )
    # One frame only: it is shown twice, like an image.
    taken_per_second = wanted / seconds
    shown = np.arange(total) / rate if times is None else times - times[0]
    pair_times = tuple(
        float(shown[frames[first]] + shown[frames[first + pair - 1]]) / 2 for first in range(0, wanted, pair)
    )
    return VideoPlan(frames, (wanted // pair, rows, columns), pair / taken_per_second, (height, width), pair_times)


def read_frames(
    media: Media, frames: tuple[int, ...], grid: tuple[int, int, int], vision: PatchGeometry, resample: str
) -> np.ndarray:
    """(frames, height, width, 3) uint8 pixels at the size of the grid.

    A file that ends early repeats its last frame once at most.

    Raises SampleError when it does not decode, or when more than one frame pair is missing at its end.
    """
    wanted = set(frames)
    last = max(frames)
    found: dict[int, np.ndarray] = {}
    with _opened(media) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                upright = _upright(frame.to_ndarray(format="rgb24"), _display(frame))
                found[number] = images.resize_to_grid(Image.fromarray(upright), grid, vision, resample)
            if number >= last:
                break
    missing = [number for number in frames if number not in found]
    if not found or len(missing) > vision.temporal_patch_size:
        raise SampleError(
            "undecodable",
            f"{media_files.name(media)} ends early: {len(missing)} of the {len(frames)} frames that its "
            "header promises are missing",
        )
    # Counts in headers are often one too high: the last frame that there is stands in.
    final = found[max(found)]
    return np.stack([found.get(number, final) for number in frames])


def _uneven(packets: Sequence[int | None], step: float) -> np.ndarray | None:
    """Times of the frames in seconds, in the order of display, where the frame rate changes; None where it does not or
    nobody knows.
    """
    if len(packets) < 3 or step <= 0 or any(time is None for time in packets):
        return None
    times = np.sort(np.array(packets, np.float64)) * step
    gaps = np.diff(times)
    # Time bases are coarse (a 30th of a second in milliseconds): a step or a tenth of a frame is no change.
    return (
        times
        if gaps.min() >= 0 and gaps.max() > 0 and gaps.max() - gaps.min() > max(2.01 * step, 0.1 * gaps.mean())
        else None
    )


def _display(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of a frame's display matrix: a stored point (x, y) is shown at (a x + c y, b x + d y).

    A telephone held upright stores its images lying and says so here.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), np.int32)
            if len(matrix) == 9 and matrix[[0, 1, 3, 4]].any():
                return tuple(matrix[[0, 1, 3, 4]].tolist())
    return 1, 0, 0, 1


def _transposed(display: tuple[int, int, int, int]) -> bool:
    a, b, _, _ = display
    return abs(b) > abs(a)


def _upright(pixels: np.ndarray, display: tuple[int, int, int, int]) -> np.ndarray:
    """(height, width, 3) pixels as a player shows them, by the nearest of the eight right-angled orientations."""
    a, b, c, d = display
    if _transposed(display):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _shown(container: Any) -> Any:
    """The stream that players choose; a cover image that stands in the file as a video stream is none."""
    from av.stream import Disposition

    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
    ]
    best = container.streams.best("video")
    chosen = next((stream for stream in streams if best is not None and stream.index == best.index), None)
    return chosen if chosen is not None else streams[0] if streams else None


class _opened:
    """Open a video for reading; every error of the decoder becomes a SampleError."""

    def __init__(self, media: Media):
        self._media = media

    def __enter__(self) -> tuple[Any, Any]:
        import av  # here, because it loads all of FFmpeg and most runs have no video

        data = media_files.read_bytes(self._media)
        try:
            self._container = av.open(io.BytesIO(data), mode="r")
        except Exception as error:
            raise self._refusal(error) from None
        stream = _shown(self._container)
        if stream is None:
            self._container.close()
            raise SampleError("undecodable", f"{media_files.name(self._media)} has no video stream")
        return self._container, stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._container.close()
        if error is not None and isinstance(error, Exception) and not isinstance(error, SampleError):
            raise self._refusal(error) from None

    def _refusal(self, error: BaseException) -> SampleError:
        return SampleError(
            "undecodable",
            f"{media_files.name(self._media)} does not decode as a video: {type(error).__name__}: {str(error)[:200]}",
        )
