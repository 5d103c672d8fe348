"""Size that an image is resized to: the rule published with Qwen2-VL, within the patch budget of a row."""

from __future__ import annotations

import math

from mindvl_jax.data.sample import SampleError

LARGEST_ASPECT = 200


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 3136,
    max_pixels: int = 1003520,
    limit_pixels: int | None = None,
) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, the aspect ratio kept as well as possible, the area between the limits.

    This is the rule published with Qwen2-VL, which may pass `max_pixels` for very thin images and where `min_pixels`
    comes close to it; `limit_pixels` is a hard limit (a row's patch budget) that then shortens the longer side.

    Raises SampleError for an aspect ratio above 200, or an image whose shortest form passes `limit_pixels`.
    """
    if max(height, width) > LARGEST_ASPECT * min(height, width):
        raise SampleError(
            "aspect_ratio", f"an image of {width}x{height} has an aspect ratio above {LARGEST_ASPECT}; crop it"
        )
    # Python's round (half to even) is part of the published rule.
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    rows, columns = max(rows, factor), max(columns, factor)
    if limit_pixels is not None and rows * columns > limit_pixels:
        if rows >= columns:
            rows = limit_pixels // columns // factor * factor
        else:
            columns = limit_pixels // rows // factor * factor
        if min(rows, columns) < factor:
            raise SampleError(
                "too_many_patches",
                f"an image of {width}x{height} needs more than the {limit_pixels} pixels that a row has "
                "patches for; raise patches_per_row",
            )
    return rows, columns
