"""Images to patches: safe decoding, resizing (`resize.py` chooses the size), patches in window order.

P patches of one image; a merged token covers `merge_unit` neighbouring patches. Pixel rules are those published with
Qwen2-VL (transformers' Pillow image processor is the witness in the tests); patches stay uint8 until the device.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings

import numpy as np
from PIL import Image

from mindvl_jax.data.media import files as media_files
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.media.resize import smart_resize
from mindvl_jax.data.media.tiles import cut, view_count
from mindvl_jax.data.sample import Media, SampleError

# Formats decoded by Pillow itself; leaves out those that start other programs (EPS) or execute drawing lists (WMF).
# An MPO (several JPEGs in one file) is opened by the JPEG plug-in and registers none of its own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO")
Image.init()  # with an explicit list of formats Pillow loads no plug-ins by itself beyond a few
LARGEST_PIXELS = 100_000_000  # 300 MB as RGB: more is a decompression bomb or belongs into tiles
# "reduced" lets a JPEG decode at a half, a quarter or an eighth of its size where that is still no smaller than the
# target.
RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "reduced": Image.Resampling.BICUBIC,
}


# --- decoding --------------------------------------------------------------------------------------------------------


def _open(media: Media) -> tuple[Image.Image, bytes | None]:
    """A lazily opened image (header only) and its bytes. Raises SampleError."""
    if isinstance(media.data, Image.Image):
        image, data = media.data, None
    else:
        data = media_files.read_bytes(media)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of bombs and odd metadata; sizes are checked below
                image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise SampleError(
                "too_large", f"{media_files.name(media)} is larger than what is decoded: {_first_line(error)}"
            ) from None
        except (
            Exception
        ) as error:  # Pillow's parsers raise many kinds (struct.error, SyntaxError, ...) on damaged files
            raise SampleError(
                "undecodable",
                f"{media_files.name(media)} ({len(data)} bytes) is not an image of a known format "
                f"({', '.join(FORMATS)}): {_first_line(error)}",
            ) from None
    width, height = image.size
    if width * height > LARGEST_PIXELS:
        raise SampleError(
            "too_large",
            f"{media_files.name(media)} is {width}x{height}, above the {LARGEST_PIXELS // 10**6} million "
            "pixels that are decoded",
        )
    if width == 0 or height == 0:
        raise SampleError("undecodable", f"{media_files.name(media)} is {width}x{height}: it has no pixels")
    return image, data


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
"""Transpositions that undo each EXIF orientation."""


def _orientation(image: Image.Image, data: bytes | None) -> int:
    """EXIF (or XMP) orientation 1..8.

    Pillow decodes a PNG whole to look for it, so it is only asked when a chunk may hold some.
    """
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF by itself, its size too
    if image.format == "PNG" and data is not None and not _png_has_metadata(data):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_has_metadata(data: bytes) -> bool:
    """Whether a PNG has a chunk of EXIF, or of text that may hold EXIF or XMP.

    Walks over the chunks' headers, wherever they stand.
    """
    position = 8
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"eXIf":
            return True
        keyword = data[position + 8 : position + 88].split(b"\0")[0].lower()
        if kind in (b"tEXt", b"zTXt", b"iTXt") and (b"exif" in keyword or b"xmp" in keyword or b"app1" in keyword):
            return True
        position += 12 + length
    return False


def image_size(media: Media) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header. Raises SampleError for what cannot be opened."""
    image, data = _open(media)
    width, height = image.size
    return (width, height) if _orientation(image, data) >= 5 else (height, width)


def load_image(
    source: bytes | str | Media | Image.Image, *, keep_grey: bool = False, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """A decoded RGB image, upright (EXIF), its first frame when animated, transparency over white, 16 bits scaled to 8.

    Args:
      source: encoded bytes, a path (not confined to a root), a Media, or a Pillow image.
      keep_grey: leave an image without colour in one channel ("L"): a third of the work that follows, the same values.
      at_least: (height, width) that will do: a JPEG may come smaller, by its transform, but no smaller than this.
    Raises SampleError with the reason for what cannot be decoded.
    """
    if isinstance(source, str):
        source = media_files.named_file(source)
    elif not isinstance(source, Media):
        source = Media(data=source)
    image, data = _open(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = _orientation(image, data)
            if at_least is not None and image.format == "JPEG":
                image.draft(None, at_least[:: 1 if orientation >= 5 else -1])
            image.load()
            image = _to_rgb(image, keep_grey)
            # Asked before loading, which may drop the tag; turned after it.
            return image if orientation == 1 else image.transpose(_TURNS[orientation])
    except Exception as error:  # as above: damaged data raises anything from OSError to struct.error
        raise SampleError(
            "undecodable",
            f"{media_files.name(source)} starts like a {image.format} but does not decode: {_first_line(error)}",
        ) from None


def _to_rgb(image: Image.Image, keep_grey: bool) -> Image.Image:
    transparent = image.info.get("transparency")
    if (image.mode == "RGB" and transparent is None) or (image.mode == "L" and keep_grey and transparent is None):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion clips at 255 and would give a white page.
        values = np.asarray(image).astype(np.float32)
        top = float(np.nan_to_num(values).max(initial=0.0))
        scale = (
            255.0
            if image.mode == "F" and top <= 1.0
            else 255.0 / 65535.0
            if top > 255.0 or ";16" in image.mode
            else 1.0
        )
        pixels = np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8)
        if isinstance(transparent, int):  # one grey value is transparent (a PNG's tRNS), compared in 16 bits
            pixels = np.where(values == transparent, 255, pixels).astype(np.uint8)
        image = Image.fromarray(pixels)
    elif transparent is not None or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("L" if keep_grey and image.mode in ("1", "L") else "RGB")


# --- layout in window order ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class VisualLayout:
    """Layout of the patches of one image or video, in window order. Depends only on the grid, so it is shared.

    Attributes:
      grid: (frame pairs, height, width) in patches.
      patch_positions: (P, 2) int32, (height, width) of each patch.
      merged_order: (P/4,) int64, raster index (frame, row, column) of each merged patch group in window order.
      token_index: (P/4,) int32, its inverse: merged group that feeds the k-th visual token of the raster order.
      image_lengths: (frame pairs,) int32, patches of each full-attention segment.
      window_lengths: (W,) int32, patches of each attention window.
    """

    grid: tuple[int, int, int]
    patch_positions: np.ndarray
    merged_order: np.ndarray
    token_index: np.ndarray
    image_lengths: np.ndarray
    window_lengths: np.ndarray

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        return len(self.merged_order)


@functools.lru_cache(maxsize=4096)
def _layout(grid: tuple[int, int, int], merge: int, window: int | None) -> VisualLayout:
    frames, height, width = grid
    rows, columns = height // merge, width // merge
    window = window or max(rows, columns)
    frame, row, column = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    frame, row, column = frame.ravel(), row.ravel(), column.ravel()
    across = -(-columns // window)
    window_of = (frame * -(-rows // window) + row // window) * across + column // window
    order = np.argsort(window_of, kind="stable")  # stable keeps raster order inside a window
    inverse = np.empty(len(order), np.int32)
    inverse[order] = np.arange(len(order), dtype=np.int32)
    inside = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(1, merge * merge, 2)
    corners = np.stack([row[order], column[order]], -1)[:, None, :] * merge
    layout = VisualLayout(
        grid=grid,
        patch_positions=(corners + inside).reshape(-1, 2).astype(np.int32),
        merged_order=order,
        token_index=inverse,
        image_lengths=np.full(frames, height * width, np.int32),
        window_lengths=(np.bincount(window_of) * merge * merge).astype(np.int32),
    )
    for array in (
        layout.patch_positions,
        layout.merged_order,
        layout.token_index,
        layout.image_lengths,
        layout.window_lengths,
    ):
        array.flags.writeable = False
    return layout


def visual_layout(grid: tuple[int, int, int], vision: PatchGeometry) -> VisualLayout:
    """Layout of a grid of (frame pairs, height, width) patches; windows never cross frame pairs."""
    return _layout(tuple(int(n) for n in grid), vision.spatial_merge_size, vision.window_tokens)


# --- patches ---------------------------------------------------------------------------------------------------------


def image_grid(
    height: int,
    width: int,
    vision: PatchGeometry,
    *,
    min_pixels: int,
    max_pixels: int,
    limit_patches: int | None = None,
    images: int = 1,
) -> tuple[int, int, int]:
    """Grid (1, height, width) in patches that an image of that many pixels is resized to.

    (squares, height, width) where it is cut into squares, of which `images` images of a sample share the most.
    """
    if vision.image_side is not None:
        side = vision.image_side // vision.patch_size
        return view_count(height, width, vision, images=images, limit_patches=limit_patches), side, side
    limit = None if limit_patches is None else limit_patches * vision.patch_size**2
    rows, columns = smart_resize(
        height, width, factor=vision.pixels_per_token, min_pixels=min_pixels, max_pixels=max_pixels, limit_pixels=limit
    )
    return 1, rows // vision.patch_size, columns // vision.patch_size


def frames_to_patches(frames: np.ndarray, layout: VisualLayout, vision: PatchGeometry) -> np.ndarray:
    """Patches of resized frames.

    Args:
      frames: (frames, height, width, channels) uint8; the frame count is 1 or a multiple of the temporal patch size. A
        single frame may have one channel, which stands for all.
    Returns:
      (P, channels * f * patch * patch) uint8 in window order, (channel, frame, row, column) inside a patch, where f is
      the temporal patch size, or 1 for a single frame: an image's frames are equal, so one is kept until the batch.
    """
    merge, patch, depth = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    pairs, height, width = layout.grid
    f = 1 if len(frames) == 1 else depth
    split = frames.reshape(pairs, f, height // merge, merge, patch, width // merge, merge, patch, frames.shape[-1])
    groups = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(layout.tokens, -1)
    return groups[layout.merged_order].reshape(layout.patches, -1)


def resize_to_grid(
    image: Image.Image, grid: tuple[int, int, int], vision: PatchGeometry, resample: str = "bicubic"
) -> np.ndarray:
    """Return uint8 pixels (height, width, channels) at the size of the grid. Mode "L" has one channel, others three."""
    size = (grid[2] * vision.patch_size, grid[1] * vision.patch_size)
    pixels = np.asarray(image if image.size == size else image.resize(size, RESAMPLE[resample]))
    return pixels.reshape(*pixels.shape[:2], -1)


def image_frames(
    image: Image.Image, grid: tuple[int, int, int], vision: PatchGeometry, resample: str = "bicubic"
) -> np.ndarray:
    """(frames, height, width, channels) uint8 pixels of an image: one frame, or the squares that it is cut into."""
    if vision.image_side is None:
        return resize_to_grid(image, grid, vision, resample)[None]
    return cut(image, grid[0], vision, RESAMPLE[resample])


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePatches:
    """An image ready for a batch: (P, patch_dim) uint8 patches in window order and where they lie."""

    patches: np.ndarray
    layout: VisualLayout


def patchify(
    image: Image.Image,
    vision: PatchGeometry,
    min_pixels: int,
    max_pixels: int,
    *,
    resample: str = "bicubic",
    limit_patches: int | None = None,
) -> ImagePatches:
    """Resizes an image by the published rule and cuts it into patches of full `patch_dim` (the frame repeated)."""
    width, height = image.size
    grid = image_grid(height, width, vision, min_pixels=min_pixels, max_pixels=max_pixels, limit_patches=limit_patches)
    layout = visual_layout(grid, vision)
    single = frames_to_patches(image_frames(image.convert("RGB"), grid, vision, resample), layout, vision)
    return ImagePatches(repeat_frame(single, vision), layout)


def repeat_frame(patches: np.ndarray, vision: PatchGeometry) -> np.ndarray:
    """Patches of one frame with the frame repeated to the temporal patch size; full patches pass as they are."""
    if patches.shape[1] == vision.patch_dim:
        return patches
    single = patches.reshape(len(patches), vision.in_channels, 1, vision.patch_size**2)
    return np.broadcast_to(
        single, (len(patches), vision.in_channels, vision.temporal_patch_size, vision.patch_size**2)
    ).reshape(len(patches), -1)
