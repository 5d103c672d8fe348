"""Pictures a second on one core, from encoded bytes to patches, beside transformers' Pillow processor.

    python -m benchmarks.images [--seconds 5]

Both sides decode the same JPEG and PNG bytes with Pillow and cut the same patches; theirs are float32 and normalised, ours
stay uint8 (the model normalises on the device) and come out in window order. Ratios are medians of alternating rounds in
one run on one thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from mindvl_jax import presets
from mindvl_jax.data.image import image_grid, image_size, load_image, resize_to_grid, frames_to_patches, visual_layout
from mindvl_jax.data.sample import Media

CASES = [("COCO-like JPEG 640x480", (480, 640), "JPEG"), ("photo JPEG 2048x1536", (1536, 2048), "JPEG"), ("page PNG 1240x1754", (1754, 1240), "PNG"), ("icon PNG 64x64", (64, 64), "PNG")]


def picture(size: tuple[int, int], kind: str) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def sides() -> tuple[Callable[[bytes], int], Callable[[bytes], int]]:
    """Ours and theirs: encoded bytes -> number of patches made."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = presets.get("qwen2.5-vl-7b").vision
    limits = {"min_pixels": 3136, "max_pixels": 1003520}
    published = Qwen2VLImageProcessorPil(**limits)

    def ours(data: bytes) -> int:
        media = Media(data=data)
        grid = image_grid(*image_size(media), vision, **limits)
        layout = visual_layout(grid, vision)
        return len(frames_to_patches(resize_to_grid(load_image(media), grid, vision)[None], layout, vision))

    def theirs(data: bytes) -> int:
        return len(published(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"])

    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each side of each case")
    args = parser.parse_args()
    ours, theirs = sides()

    print("| Picture | ours, a second | transformers, a second | ratio |\n|---|---|---|---|")
    for name, size, kind in CASES:
        data = picture(size, kind)
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
