"""Pictures as equal squares for towers of one size: tiles in a grid (InternVL), the middle or padded whole (LLaVA,
Janus).
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from mindvl_jax.data.media.geometry import CLIP_MEAN, PatchGeometry


@functools.lru_cache(maxsize=64)
def _grids(most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of at most that many tiles, few tiles first."""
    pairs = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    return tuple(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def tile_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose shape is nearest to the picture's.

    Of equally near ones the larger is taken while the picture has more than half of its pixels.
    """
    best, difference = (1, 1), float("inf")
    for columns, rows in _grids(most):
        off = abs(width / height - columns / rows)
        if off < difference or (off == difference and width * height > 0.5 * side * side * columns * rows):
            best, difference = (columns, rows), off
    return best


def view_count(height: int, width: int, vision: PatchGeometry, *, images: int = 1, limit_patches: int | None) -> int:
    """Squares of one picture: its tiles and, if they are several, the whole made small.

    Args:
      images: pictures that share the most tiles of a sample. limit_patches: as `image_grid`.
    """
    most = max(1, vision.max_tiles // images)
    if limit_patches is not None:
        most = max(1, min(most, limit_patches // vision.view_patches - 1))
    columns, rows = tile_grid(height, width, vision.image_side, most)
    return columns * rows + (columns * rows > 1)


def _one_square(image: Image.Image, vision: PatchGeometry, resample: int) -> np.ndarray:
    """(side, side, channels) uint8: the middle of the picture, its shorter edge made `side`; all of it where it is
    padded to a square before.
    """
    side = vision.image_side
    if vision.fit == "pad" and image.width != image.height:
        longer = max(image.size)
        ground = Image.new("RGB", (longer, longer), tuple(int(255 * mean) for mean in CLIP_MEAN))
        ground.paste(image.convert("RGB"), ((longer - image.width) // 2, (longer - image.height) // 2))
        image = ground
    shorter, longer = sorted(image.size)
    size = (side, int(side * longer / shorter))
    width, height = size if image.width <= image.height else size[::-1]
    pixels = np.asarray(image.resize((width, height), resample)).reshape(height, width, -1)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _inside(image: Image.Image, side: int, resample: int) -> np.ndarray:
    """(side, side, 3) uint8: the longer edge made `side`, the shorter with it (14 at least), grey around.

    Sizes are rounded, as transformers does; Janus' own code cuts off the fraction, which may be a line less.
    """
    share = side / max(image.size)
    width, height = (max(round(edge * share), min(14, side)) for edge in image.size)
    ground = Image.new("RGB", (side, side), (127, 127, 127))
    ground.paste(image.convert("RGB").resize((width, height), resample), ((side - width) // 2, (side - height) // 2))
    return np.asarray(ground)


def cut(image: Image.Image, views: int, vision: PatchGeometry, resample: int) -> np.ndarray:
    """(views, side, side, channels) uint8: tiles row by row, then the whole if they are several."""
    if vision.fit == "inside":
        return _inside(image, vision.image_side, resample)[None]
    if vision.fit != "tiles":
        return _one_square(image, vision, resample)[None]
    side, tiles = vision.image_side, max(1, views - 1)
    # The grid of so many tiles that was nearest among more is nearest among no more than these.
    columns, rows = tile_grid(image.height, image.width, side, tiles)

    def pixels(width, height):
        values = np.asarray(image.resize((width, height), resample))
        return values.reshape(height, width, -1)

    whole = pixels(side * columns, side * rows)
    cells = whole.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(tiles, side, side, -1)
    return cells if tiles == 1 else np.concatenate([cells, pixels(side, side)[None]])
