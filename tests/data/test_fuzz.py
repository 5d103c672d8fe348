"""Mutated samples and files: each is read or refused with a reason, in bounded time and memory, never a crash.

`MINDVL_FUZZ=100000` sets the number of mutated samples, a tenth of it that of mutated images; the default takes
seconds.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from data_toys import encoded, model_config, picture, record, tokenizer
from PIL import Image

from mindvl_jax.config.schema import ColumnMapping
from mindvl_jax.data.record import sample_from_record
from mindvl_jax.data.sample import Media, SampleError
from mindvl_jax.models.vision_language.collate import collate, shape_for
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder

COUNT = int(os.environ.get("MINDVL_FUZZ", "1500"))
SECONDS_EACH = 2.0  # of processor time for one input, at most
MODEL = model_config()
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    "",
    "user",
    "assistant",
    "tool",
    "<image>",
    "<image>" * 50,
    "<video>",
    "<|im_end|>",
    "\ud800",
    "\0",
    "图" * 40,
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"role": "user"},
    {"bytes": b"x"},
    {"type": "text", "text": 3},
    b"\xff\xfe",
]
KEYS = [
    "id",
    "images",
    "videos",
    "messages",
    "role",
    "content",
    "image",
    "conversations",
    "from",
    "value",
    "system",
    "answers",
    "task",
    "bytes",
    "path",
]


def mutate(value, rng, depth=0):
    """The same structure with one thing changed somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value = dict(value)
        key = list(value)[rng.integers(len(value))]
        kind = rng.integers(5)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[KEYS[rng.integers(len(KEYS))]] = value.pop(key)
        else:
            value[key] = mutate(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value = list(value)
        at = rng.integers(len(value))
        kind = rng.integers(6)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.insert(at, value[rng.integers(len(value))])
        elif kind == 2:
            value.reverse()
        else:
            value[at] = mutate(value[at], rng, depth + 1)
        return value
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.integers(len(value))
        return (
            value[:at]
            + ["", "<image>", "<|image_pad|>", "\U0001f600", "\ud83d", "\n" * 300][rng.integers(6)]
            + value[at:]
        )
    return VALUES[rng.integers(len(VALUES))]


@pytest.fixture(scope="module")
def encoder():
    return ExampleEncoder(
        MODEL,
        tokenizer(),
        EncodeLimits(min_pixels=784, max_pixels=12544, max_tokens=512, max_patches=256, limit_image_patches=64),
    )


def accept_or_refuse(encoder, raw) -> str | None:
    """The reason of the refusal, or None when a batch could be made of it. Anything but SampleError fails the test."""
    start = time.process_time()
    try:
        sample = sample_from_record(raw, columns=ColumnMapping(), media_root="/nonexistent", default_id="d", origin="o")
        example = encoder.encode(sample).with_pixels(MODEL.vision, "bicubic")
        shape = shape_for(MODEL.vision, rows=1, tokens=512, patches=256, samples=1)
        batch = collate([[example]], shape, pad_id=0, vision=MODEL.vision).batch
        visual = batch.tokens[0] == MODEL.image_token_id
        assert visual.sum() * 4 == (batch.patch_segment_ids > 0).sum() and batch.loss_weights.sum() > 0
        reason = None
    except SampleError as error:
        assert str(error) and error.reason
        reason = error.reason
    taken = time.process_time() - start
    assert taken < SECONDS_EACH, f"{taken:.1f} s for {raw!r}"
    return reason


def test_mutated_samples_are_read_or_refused_with_a_reason(encoder):
    rng = np.random.default_rng(int(os.environ.get("MINDVL_FUZZ_SEED", "0")))
    image = encoded(picture(0))
    reasons: dict[str | None, int] = {}
    for number in range(COUNT):
        raw = record(number, media=[{"bytes": image, "path": None}] * int(rng.integers(3)))
        if rng.random() < 0.3:
            raw = {
                "id": "l",
                "image": {"bytes": image},
                "conversations": [
                    {"from": "human", "value": "<image> a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ],
            }
        for _ in range(1 + int(rng.integers(3))):
            raw = mutate(raw, rng)
        reason = accept_or_refuse(encoder, raw)
        reasons[reason] = reasons.get(reason, 0) + 1
    # The mutations must reach both sides of the border and many kinds of refusal, or this test tests nothing.
    assert 0.02 < reasons.get(None, 0) / COUNT < 0.9 and len(reasons) >= 7, reasons


def test_mutated_pictures_are_decoded_or_refused_with_a_reason(encoder):
    rng = np.random.default_rng(int(os.environ.get("MINDVL_FUZZ_SEED", "0")))
    base = picture(1, 60, 80)
    exif = Image.Exif()
    exif[0x0112] = 5
    files = [
        encoded(base),
        encoded(base, "JPEG", exif=exif),
        encoded(base, "WEBP"),
        encoded(base, "GIF"),
        encoded(base, "BMP"),
        encoded(base, "TIFF"),
        encoded(base, "PPM"),
        encoded(base.convert("CMYK"), "JPEG"),
        encoded(base.convert("RGBA")),
        encoded(base.convert("P"), "PNG", transparency=0),
        encoded(base, "TIFF", compression="tiff_lzw"),
        encoded(base, "GIF", save_all=True, append_images=[picture(2, 60, 80)]),
        encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80))),
        encoded(base, "AVIF"),
        encoded(base, "ICO"),
    ]
    reasons: dict[str | None, int] = {}
    for _ in range(COUNT // 10):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(int(rng.integers(1, 12))):
            kind = rng.integers(4)
            at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(64, len(data))))
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                data[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x80\0"][
                    rng.integers(4)
                ]
            elif kind == 2 and len(data) > 80:
                del data[at:]
                data = data or bytearray(b"\0")
            else:
                data[at:at] = data[: int(rng.integers(200))]
        reason = accept_or_refuse(encoder, record(0, media=[{"bytes": bytes(data), "path": None}]))
        reasons[reason] = reasons.get(reason, 0) + 1
    assert reasons.get(None, 0) and reasons.get("undecodable", 0), reasons


def test_mutated_lines_of_a_file_are_read_or_refused(tmp_path):
    from mindvl_jax.config.schema import SourceConfig
    from mindvl_jax.data.sources.readers import Source

    rng = np.random.default_rng(0)
    lines = []
    for number in range(200):
        line = bytearray(json.dumps(record(number)).encode())
        for _ in range(int(rng.integers(0, 4))):
            line[rng.integers(len(line))] = rng.choice([0, 10, 34, 92, 123, 125, 200, 255])
        lines.append(bytes(line))
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    source = Source("a", SourceConfig(path=str(tmp_path / "d.jsonl")))
    outcomes = set()
    for index in range(len(source)):
        try:
            source[index]
            outcomes.add("read")
        except SampleError as error:
            assert "line" in source.where(index)
            outcomes.add(error.reason)
    assert {"read", "malformed"} <= outcomes, outcomes


def test_a_picture_that_is_a_bomb_when_opened_does_not_take_memory():
    """A 40,000 x 40,000 page of one colour compresses to little; only its header may be looked at."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from mindvl_jax.data.media.image import load_image

    with pytest.raises(SampleError) as caught:
        load_image(Media(data=b"P5 40000 40000 255\n" + b"\0" * 64))
    assert caught.value.reason == "too_large"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"grew by {grown:.0f} MB"
