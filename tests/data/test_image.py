"""Images against transformers' Pillow processor and window index, and every odd form a file may take."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
from data_toys import encoded, model_config, picture
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mindvl_jax.data.media import image as images
from mindvl_jax.data.media.resize import smart_resize
from mindvl_jax.data.sample import Media, SampleError
from mindvl_jax.models.vision_language.collate import write_pixels
from mindvl_jax.models.vision_language.example import VisualItem, read_pixels

VISION = model_config().vision
SIZES = [(56, 56), (200, 300), (1, 1), (30, 5000), (640, 480), (47, 33), (28, 700), (999, 1001), (3000, 20), (113, 112)]


@pytest.mark.parametrize("limits", [(3136, 1003520), (784, 12544), (50176, 50176), (100352, 262144)])
def test_smart_resize_gives_the_published_sizes(limits):
    rng = np.random.default_rng(0)
    sizes = SIZES + [tuple(int(n) for n in rng.integers(1, 1500, 2)) for _ in range(400)]
    for height, width in sizes:
        if max(height, width) / min(height, width) > 200:
            continue
        expected = published_resize(height, width, 28, *limits)
        assert smart_resize(height, width, min_pixels=limits[0], max_pixels=limits[1]) == expected, (
            height,
            width,
        )


def test_a_hard_limit_shortens_the_longer_side_only_where_the_published_rule_passes_it():
    for height, width in SIZES:
        if max(height, width) > 200 * min(height, width):
            continue
        rows, columns = smart_resize(height, width, min_pixels=784, max_pixels=12544, limit_pixels=12544)
        assert rows * columns <= 12544 and rows % 28 == columns % 28 == 0
        published = smart_resize(height, width, min_pixels=784, max_pixels=12544)
        if published[0] * published[1] <= 12544:
            assert (rows, columns) == published


@pytest.mark.parametrize(("height", "width"), [(200, 300), (57, 31), (28, 700), (640, 480), (113, 112)])
def test_patches_equal_the_published_processor_value_for_value(height, width):
    source = picture(3, height, width)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200704)
    raw = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200704, do_rescale=False, do_normalize=False)
    ours = images.patchify(source, VISION, 3136, 200704)
    grid = raw(source, return_tensors="np")["image_grid_thw"][0]
    assert tuple(grid) == ours.layout.grid
    window_index, _ = get_vision_window_index(torch.tensor(grid[None]), 2, 112, 14)

    def in_windows(values):
        return values.reshape(-1, 4, values.shape[-1])[window_index.numpy()].reshape(values.shape)

    expected = in_windows(raw(source, return_tensors="np")["pixel_values"])
    difference = np.abs(expected - ours.patches.astype(np.float32)).max()
    assert difference == 0, f"uint8 patches differ by up to {difference}"
    # Normalised as the model does it: the published mean and deviation, float32. Two orders of rounding: 1e-6 is one
    # unit in the last place of values up to 3.
    mean, deviation = np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32)
    pixels = ours.patches.reshape(-1, 3, 2 * 14 * 14).astype(np.float32) / 255
    normalised = ((pixels - mean[:, None]) / deviation[:, None]).reshape(ours.patches.shape)
    difference = np.abs(in_windows(processor(source, return_tensors="np")["pixel_values"]) - normalised).max()
    assert difference <= 1e-6, f"normalised patches differ by up to {difference}"


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 8, 8), (1, 10, 6), (1, 2, 50), (3, 18, 22), (2, 16, 8)])
def test_window_order_and_patch_positions_are_the_published_ones(grid):
    layout = images.visual_layout(grid, VISION)
    thw = torch.tensor([grid])
    window_index, boundaries = get_vision_window_index(thw, 2, 112, 14)
    np.testing.assert_array_equal(layout.merged_order, window_index.numpy())
    np.testing.assert_array_equal(np.cumsum(layout.window_lengths), boundaries.numpy()[1:])
    np.testing.assert_array_equal(layout.token_index[layout.merged_order], np.arange(layout.tokens))
    positions = get_vision_position_ids(thw, 2).numpy().reshape(-1, 4, 2)[window_index.numpy()].reshape(-1, 2)
    np.testing.assert_array_equal(layout.patch_positions, positions)
    assert layout.image_lengths.tolist() == [grid[1] * grid[2]] * grid[0]


def test_nearest_resampling_is_an_option_and_differs_from_bicubic():
    source = picture(1, 100, 100)
    bicubic = images.patchify(source, VISION, 784, 3136).patches
    nearest = images.patchify(source, VISION, 784, 3136, resample="nearest").patches
    size = smart_resize(100, 100, min_pixels=784, max_pixels=3136)
    expected = np.asarray(source.resize(size[::-1], Image.Resampling.NEAREST))
    assert (nearest != bicubic).any()
    assert sorted(nearest[:, :196].ravel()) == sorted(expected[:, :, 0].ravel())


# --- forms of files ---


def test_exif_orientation_turns_the_picture_and_its_size():
    source = picture(5, 40, 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(source, kind, exif=exif)
        assert images.image_size(Media(data=data)) == (90, 40), kind
        assert images.load_image(data).size == (40, 90), kind
    upright = np.asarray(images.load_image(encoded(source, "PNG", exif=exif)))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(source), -1))


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (30, 30), (200, 10, 10, 0))
    assert np.asarray(images.load_image(encoded(clear))).min() == 255
    half = Image.new("LA", (30, 30), (0, 128))
    assert abs(int(np.asarray(images.load_image(encoded(half)))[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([9, 9, 9] + [0] * 765)
    assert np.asarray(images.load_image(encoded(palette, "PNG", transparency=0))).min() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)
    loaded = np.asarray(images.load_image(encoded(Image.fromarray(values))))[:, :, 0]
    assert np.abs(loaded.astype(int) - np.round(values / 257)).max() <= 1


def test_cmyk_palette_grey_and_animation_become_rgb():
    for mode in ("L", "1", "P"):
        assert images.load_image(encoded(picture(2, 30, 40, mode))).mode == "RGB"
    assert images.load_image(encoded(picture(2, 30, 40).convert("CMYK"), "JPEG")).mode == "RGB"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        loaded = np.asarray(images.load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:])))
        assert loaded[5, 5, 0] > 200 and loaded[5, 5, 1] < 50, f"{kind}: the first frame is red"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"this is text, whatever the name says", "undecodable"),
        (encoded(picture(0, 300, 300), "JPEG")[:700], "undecodable"),
        (encoded(picture(0, 300, 300), "PNG")[:700], "undecodable"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "undecodable"),
    ],
)
def test_damaged_files_are_refused_with_a_reason(data, reason):
    with pytest.raises(SampleError) as caught:
        images.load_image(data)
    assert caught.value.reason == reason and str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    # A PNG header that promises 40,000 x 40,000 pixels; decoding would take 4.8 GB.
    small = bytearray(encoded(Image.new("1", (8, 8))))
    small[16:24] = (40000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    with pytest.raises(SampleError) as caught:
        images.image_size(Media(data=bytes(small)))
    assert caught.value.reason == "too_large"


def test_extreme_sizes_either_fit_or_are_refused():
    assert images.patchify(picture(0, 1, 1), VISION, 784, 12544).layout.tokens == 1
    with pytest.raises(SampleError) as caught:
        images.patchify(Image.new("RGB", (20000, 3)), VISION, 784, 12544)
    assert caught.value.reason == "aspect_ratio"


def test_a_picture_in_memory_is_taken_as_it_is():
    source = picture(7, 60, 30)
    assert images.image_size(Media(data=source)) == (60, 30)
    np.testing.assert_array_equal(np.asarray(images.load_image(source)), np.asarray(source))
    file = io.BytesIO()
    source.save(file, "BMP")
    np.testing.assert_array_equal(np.asarray(images.load_image(file.getvalue())), np.asarray(source))


# --- images without colour, and JPEG files decoded smaller ---


def batch_patches(media, resample="bicubic", min_pixels=3136, max_pixels=200704):
    """Patches of an image as they lie in a batch, (P, patch_dim) uint8: the whole way from bytes."""
    height, width = images.image_size(media)
    layout = images.visual_layout(
        images.image_grid(height, width, VISION, min_pixels=min_pixels, max_pixels=max_pixels), VISION
    )
    pixels = read_pixels(VisualItem(media, "image", layout), VISION, resample)
    place = np.zeros((layout.patches, VISION.patch_dim), np.uint8)
    write_pixels(place, pixels, VISION)
    return place, pixels


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_a_picture_without_colour_keeps_one_channel_until_the_batch_and_gives_the_published_values(mode):
    grey = picture(2, 170, 230).convert("L")
    source = (
        grey
        if mode == "L"
        else grey.convert("1")
        if mode == "1"
        else Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    )
    place, pixels = batch_patches(Media(data=encoded(source)))
    assert pixels.shape[1] == 196, "three equal channels would be three times the work"
    wanted = images.patchify(images.load_image(Media(data=encoded(source))), VISION, 3136, 200704)
    np.testing.assert_array_equal(place, wanted.patches)
    if mode == "L":  # the witness takes 16 bits another way and does not resize bits
        theirs = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200704, do_rescale=False, do_normalize=False)(
            source.convert("RGB"), return_tensors="np"
        )["pixel_values"]
        order = wanted.layout.merged_order
        np.testing.assert_array_equal(place, theirs.reshape(-1, 4, VISION.patch_dim)[order].reshape(place.shape))


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_never_goes_below_the_target_and_stays_close_to_bicubic(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = picture(4, 12, 16).resize((1600, 1200), Image.Resampling.BICUBIC)
    media = Media(data=encoded(smooth, "JPEG", exif=exif, quality=95))
    upright = images.image_size(media)
    assert upright == ((1200, 1600) if orientation == 1 else (1600, 1200))
    small = images.load_image(media, at_least=(upright[0] // 3, upright[1] // 3))
    assert small.size == (upright[1] // 2, upright[0] // 2), "a half is the smallest that is no smaller than a third"
    exact, reduced = (batch_patches(media, resample)[0].astype(int) for resample in ("bicubic", "reduced"))
    assert exact.shape == reduced.shape
    difference = np.abs(exact - reduced).mean()
    assert 0 < difference < 1.0, f"mean difference {difference:.2f} of 255"


def test_what_is_no_larger_than_twice_the_target_is_the_same_reduced_or_not():
    media = Media(data=encoded(picture(4, 300, 400), "JPEG"))
    np.testing.assert_array_equal(batch_patches(media)[0], batch_patches(media, "reduced")[0])
