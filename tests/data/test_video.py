"""Video through PyAV: frames at the asked rate, even counts, seconds for the positions, damaged files refused."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from data_toys import model_config, tokenizer

from mindvl_jax.data.media.video import plan_frames, read_frames
from mindvl_jax.data.sample import Media, Message, Sample, SampleError
from mindvl_jax.models.vision_language.collate import pack_prompts
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder

MODEL = model_config()
VISION = MODEL.vision


def movie(frames: int, *, rate: int = 8, width: int = 112, height: int = 84, kind: str = "mp4") -> bytes:
    """Frame k is grey of value 20 + 5 k, so that a decoded frame tells its number."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        for number in range(frames):
            picture = np.full((height, width, 3), 20 + 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(pixels: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 20) / 5) for frame in pixels]


@pytest.mark.parametrize(
    ("frames", "fps", "limit", "expected", "seconds"),
    [
        (32, 2.0, 64, [0, 4, 9, 13, 18, 22, 27, 31], 1.0),  # 4 s at 2 a second: 8 frames
        (32, 2.0, 4, [0, 10, 21, 31], 2.0),  # the frame limit binds
        (32, 100.0, 64, list(range(32)), 0.25),  # never more than there are
        (13, 2.0, 64, [0, 4, 8, 12], 0.8125),  # 1.625 s ask for 4 frames
        (3, 0.1, 64, [0, 2], 0.375),  # always a whole pair
    ],
)
def test_frames_are_spread_over_the_whole_clip(frames, fps, limit, expected, seconds):
    media = Media(data=movie(frames))
    plan = plan_frames(media, VISION, fps=fps, max_frames=limit, min_pixels=784, max_pixels=12544)
    assert list(plan.frames) == expected
    assert plan.seconds_per_pair == pytest.approx(seconds)
    assert plan.grid == (len(expected) // 2, 6, 8)
    pixels = read_frames(media, plan.frames, plan.grid, VISION, "bicubic")
    assert pixels.shape == (len(expected), 84, 112, 3)
    assert numbers(pixels) == expected


def test_one_frame_is_shown_twice():
    media = Media(data=movie(1))
    plan = plan_frames(media, VISION, fps=2.0, max_frames=8, min_pixels=784, max_pixels=12544)
    assert plan.frames == (0, 0) and plan.grid[0] == 1


def test_a_long_clip_shrinks_to_the_patches_of_a_row():
    media = Media(data=movie(32))
    plan = plan_frames(media, VISION, fps=8.0, max_frames=32, min_pixels=784, max_pixels=12544, total_patches=200)
    assert plan.grid[0] == 16 and np.prod(plan.grid) <= 200


def test_a_video_sample_carries_time_in_its_positions_and_both_frames_in_its_patches():
    encoder = ExampleEncoder(MODEL, tokenizer(), EncodeLimits(min_pixels=784, max_pixels=12544, video_fps=2.0))
    sample = Sample(
        "v", (Message("user", "<video>What moves?"), Message("assistant", "Nothing.")), videos=(Media(data=movie(32)),)
    )
    example = encoder.encode(sample)
    places = np.flatnonzero(example.tokens == MODEL.video_token_id)
    assert len(places) == 4 * 3 * 4 and example.image_lengths.tolist() == [48] * 4
    # A second between frame pairs, two positions a second.
    assert sorted(set((example.positions[0, places] - example.positions[0, places[0]]).tolist())) == [0, 2, 4, 6]
    patches = pack_prompts([example], vision=VISION, pad_id=0).batch.patches[0].reshape(4, 48, 3, 2, 196)
    brightness = patches.mean(axis=(1, 2, 4))
    assert numbers(np.broadcast_to(brightness.reshape(8, 1), (8, 3))) == [0, 4, 9, 13, 18, 22, 27, 31]


@pytest.mark.parametrize("kind", ["avi", "matroska", "mp4"])
def test_containers_are_read(kind):
    media = Media(data=movie(9, kind=kind))
    assert plan_frames(media, VISION, fps=8, max_frames=8, min_pixels=784, max_pixels=12544).frames == tuple(
        np.round(np.linspace(0, 8, 8)).astype(int)
    )


@pytest.mark.parametrize(
    "data", [b"", b"no video", movie(16)[:300], b"\x00" * 5000], ids=["empty", "text", "cut", "zeros"]
)
def test_damaged_videos_are_refused(data):
    with pytest.raises(SampleError) as caught:
        plan = plan_frames(Media(data=data), VISION, fps=2, max_frames=8, min_pixels=784, max_pixels=12544)
        read_frames(Media(data=data), plan.frames, plan.grid, VISION, "bicubic")
    assert caught.value.reason == "undecodable"


def test_a_video_that_ends_early_is_refused_when_its_pixels_are_read():
    data = movie(40, kind="avi")
    media = Media(data=data[: int(len(data) * 0.6)])
    plan = plan_frames(media, VISION, fps=8, max_frames=40, min_pixels=784, max_pixels=12544)
    assert len(plan.frames) == 40, "the header still promises all frames"
    with pytest.raises(SampleError, match="of the 40 frames that its header promises are missing"):
        read_frames(media, plan.frames, plan.grid, VISION, "bicubic")
