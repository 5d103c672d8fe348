"""Images a second on one core, from encoded bytes to patches, beside transformers' Pillow processor.

    python -m benchmarks.images [--seconds 5]

Both sides decode the same JPEG and PNG bytes with Pillow and cut the same patches; theirs are float32 and normalised,
ours stay uint8 (the model normalises on the device) and come out in window order. Ratios are medians of alternating
rounds in one run on one thread. A "noise" image is coarse noise, the hardest there is for PNG; a "page" is printed text
on white, in colour or grey as scanners give it. "reduced" is data.resample's fast way for JPEG, whose values are not
the published ones.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mindvl_jax.config import families
from mindvl_jax.data.media.image import image_grid, image_size, visual_layout
from mindvl_jax.data.sample import Media
from mindvl_jax.models.vision_language.example import VisualItem, read_pixels

# name, (height, width), file format, content, data.resample
CASES = [
    ("COCO-like JPEG 640x480", (480, 640), "JPEG", "noise", "bicubic"),
    ("photo JPEG 2048x1536", (1536, 2048), "JPEG", "noise", "bicubic"),
    ("photo JPEG 4000x3000", (3000, 4000), "JPEG", "noise", "bicubic"),
    ("photo JPEG 4000x3000, reduced", (3000, 4000), "JPEG", "noise", "reduced"),
    ("page PNG 1240x1754, colour", (1754, 1240), "PNG", "page", "bicubic"),
    ("page PNG 1240x1754, grey", (1754, 1240), "PNG", "grey page", "bicubic"),
    ("noise PNG 1240x1754", (1754, 1240), "PNG", "noise", "bicubic"),
    ("icon PNG 64x64", (64, 64), "PNG", "noise", "bicubic"),
]


def picture(size: tuple[int, int], kind: str, content: str) -> bytes:
    rng = np.random.default_rng(0)
    if content == "noise":
        image = Image.fromarray(rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
    else:
        image = Image.new("RGB" if content == "page" else "L", size[::-1], "white")
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(22)
        for line in range(40, size[0] - 40, 30):
            draw.text(
                (80, line),
                " ".join("".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 10))) for _ in range(15)),
                fill=(20, 20, 60) if content == "page" else 30,
                font=font,
            )
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()


def sides(resample: str = "bicubic") -> tuple[Callable[[bytes], int], Callable[[bytes], int]]:
    """Ours and theirs: encoded bytes -> number of patches made."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = families.preset("qwen2.5-vl-7b").vision
    limits = {"min_pixels": 3136, "max_pixels": 1003520}
    published = Qwen2VLImageProcessorPil(**limits)

    def ours(data: bytes) -> int:
        media = Media(data=data)
        grid = image_grid(*image_size(media), vision, **limits)
        return len(read_pixels(VisualItem(media, "image", visual_layout(grid, vision)), vision, resample))

    def theirs(data: bytes) -> int:
        return len(published(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"])

    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each side of each case")
    args = parser.parse_args()
    print("| Picture | ours, a second | transformers, a second | ratio |\n|---|---|---|---|")
    for name, size, kind, content, resample in CASES:
        data = picture(size, kind, content)
        ours, theirs = sides(resample)
        assert ours(data) == theirs(data)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        end = time.perf_counter() + 2 * args.seconds
        while time.perf_counter() < end or len(times["ours"]) < 5:
            for side, function in (("ours", ours), ("theirs", theirs)):
                start = time.process_time()
                function(data)
                times[side].append(time.process_time() - start)
        a, b = statistics.median(times["ours"]), statistics.median(times["theirs"])
        print(f"| {name} | {1 / a:.0f} | {1 / b:.0f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
