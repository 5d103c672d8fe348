"""Container metadata (orientation, transparency, streams, times) is applied as Pillow and players
follow it.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import av
import numpy as np
import pytest
from data_toys import encoded, model_config
from PIL import Image, ImageOps

from mindvl_jax.data.media.image import FORMATS, image_size, load_image
from mindvl_jax.data.media.video import plan_frames, read_frames
from mindvl_jax.data.sample import Media, SampleError

VISION = model_config().vision
CORNER = Image.new("RGB", (56, 28), (20, 20, 200))
CORNER.paste((230, 30, 30), (0, 0, 14, 14))  # red where the stored image's upper left is


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes, *, last: bool, padding: int = 0) -> bytes:
    """A PNG with a chunk before its pixels, or after them with as many bytes of other chunks behind it."""
    at = png.index(b"IEND") - 4 if last else png.index(b"IDAT") - 4
    return png[:at] + chunk(kind, body) + (chunk(b"teSt", bytes(padding)) if padding else b"") + png[at:]


def places(orientation: int) -> dict[str, bytes]:
    """One image with its orientation in every place where it may stand."""
    png, text = encoded(CORNER), b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation)
    raw = "\nexif\n%8d\n%s\n" % (len(exif(orientation)), exif(orientation).hex())
    return {
        "JPEG, EXIF": encoded(CORNER, "JPEG", exif=exif(orientation), quality=95),
        "JPEG, XMP": encoded(CORNER, "JPEG", xmp=xmp(orientation), quality=95),
        "MPO": encoded(CORNER, "MPO", exif=exif(orientation), save_all=True, append_images=[CORNER]),
        "WEBP, EXIF": encoded(CORNER, "WEBP", exif=exif(orientation), lossless=True),
        "WEBP, XMP": encoded(CORNER, "WEBP", xmp=xmp(orientation), lossless=True),
        "AVIF": encoded(CORNER, "AVIF", exif=exif(orientation), quality=95),
        "TIFF": encoded(CORNER, "TIFF", exif=exif(orientation)),
        "PNG, eXIf before the pixels": with_chunk(
            png, b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"), last=False
        ),
        "PNG, eXIf far before the end": with_chunk(
            png, b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"), last=True, padding=200_000
        ),
        "PNG, XMP": with_chunk(png, b"iTXt", text, last=False),
        "PNG, raw profile": with_chunk(
            png, b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw.encode()), last=False
        ),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed_wherever_it_stands(orientation):
    for place, data in places(orientation).items():
        opened = Image.open(io.BytesIO(data))
        opened.load()
        witness = ImageOps.exif_transpose(opened).convert("RGB")
        ours = load_image(data)
        assert ours.size == witness.size and image_size(Media(data=data)) == ours.size[::-1], place
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(witness), err_msg=place)
        assert ours.size == ((28, 56) if orientation >= 5 else (56, 28)), place


@pytest.mark.parametrize("kind", FORMATS)
def test_every_declared_format_opens(kind):
    data = encoded(Image.new("RGB", (32, 32), (200, 30, 30)), kind)
    pixel = load_image(data).getpixel((16, 16))
    assert load_image(data).size == (32, 32) and max(abs(a - b) for a, b in zip(pixel, (200, 30, 30))) < 8


def test_what_is_no_image_is_refused_with_the_formats_and_no_inner_error():
    with pytest.raises(SampleError, match="not an image of a known format") as error:
        load_image(b"<html>404</html>")
    assert "KeyError" not in str(error.value)


def transparent(mode: str) -> tuple[bytes, tuple[int, int, int], tuple[int, int, int]]:
    """(PNG whose left half is transparent, what its halves look like over white)."""
    left, white = (slice(None), slice(0, 14)), (255, 255, 255)
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (28, 28), (90, 90, 90, 255))
        image.paste((10, 10, 10, 0), (0, 0, 14, 28))
        return encoded(image.convert(mode)), white, (90, 90, 90)
    if mode == "half":
        return encoded(Image.new("RGBA", (28, 28), (100, 0, 0, 128))), (177, 127, 127), (177, 127, 127)
    if mode == "I;16":
        values = np.full((28, 28), 40_000, np.uint16)
        values[left] = 5_000
        return encoded(Image.fromarray(values), transparency=5_000), white, (156, 156, 156)
    pixels = np.full((28, 28, 3), 90, np.uint8)
    pixels[left] = 10
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(4)
        return encoded(image, transparency=image.getpixel((0, 0))), white, (90, 90, 90)
    if mode == "P, alpha of each colour":
        image = image.quantize(4)
        return (
            encoded(image, transparency=bytes(0 if index == image.getpixel((0, 0)) else 255 for index in range(4))),
            white,
            (90, 90, 90),
        )
    if mode == "1":
        bits = Image.new("1", (28, 28), 1)
        bits.paste(0, (0, 0, 14, 28))
        return encoded(bits, transparency=0), white, white
    return encoded(image.convert(mode), transparency=10 if mode == "L" else (10, 10, 10)), white, (90, 90, 90)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P", "P, alpha of each colour", "RGB", "RGBA", "half"])
def test_transparency_of_every_png_kind_lies_over_white(mode, grey):
    data, left, right = transparent(mode)
    image = load_image(data, keep_grey=grey).convert("RGB")
    for at, wanted in (((3, 14), left), ((24, 14), right)):
        assert max(abs(a - b) for a, b in zip(image.getpixel(at), wanted)) <= 1, (mode, at, image.getpixel(at))


# --- video -----------------------------------------------------------------------------------------------------------


def movie(
    *,
    corner: bool = False,
    times: list[int] | None = None,
    count: int = 8,
    level: int = 20,
    cover: bool = False,
    second: bool = False,
    kind: str = "mp4",
) -> bytes:
    """Frame k is grey of value level + 5 k (or has a green upper left corner). `times` in hundredths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        if second:
            small = container.add_stream("mpeg4", rate=10)
            small.width, small.height, small.pix_fmt = 56, 28, "yuv420p"
            small.disposition = 0
        stream = container.add_stream("mpeg4", rate=100 if times else 10)
        stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        if second:
            stream.disposition = 1
        for number in range(len(times) if times else count):
            pixels = np.full((56, 112, 3), 0 if corner else level + 5 * number, np.uint8)
            if corner:
                pixels[:28, :56] = (0, 255, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
            if second:
                container.mux(
                    small.encode(av.VideoFrame.from_ndarray(np.full((28, 56, 3), 250, np.uint8), format="rgb24"))
                )
        container.mux(stream.encode())
        if second:
            container.mux(small.encode())
    return file.getvalue()


def planned(data: bytes, **options):
    media = Media(data=data)
    plan = plan_frames(media, VISION, **{"fps": 2, "max_frames": 4, "min_pixels": 784, "max_pixels": 100352, **options})
    return plan, read_frames(media, plan.frames, plan.grid, VISION, "bicubic")


# The eight orientations that a display matrix can say, and where a player shows the stored upper left corner.
MATRICES = {
    (1, 0, 0, 1): (0, 0), (0, 1, -1, 0): (0, -1), (-1, 0, 0, -1): (-1, -1), (0, -1, 1, 0): (-1, 0),
    (-1, 0, 0, 1): (0, -1), (1, 0, 0, -1): (-1, 0), (0, 1, 1, 0): (0, 0), (0, -1, -1, 0): (-1, -1),
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_shown_by_its_display_matrix(matrix):
    data = bytearray(movie(corner=True))
    header = data.find(b"tkhd")
    at = header + 8 + (32 if data[header + 4] else 20) + 16
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    plan, frames = planned(bytes(data))
    assert frames.shape[1:3] == ((112, 56) if matrix[1] else (56, 112))
    y, x = (3 if side == 0 else -4 for side in MATRICES[matrix])
    assert frames[0][y, x, 1] > 200 and [
        frames[0][-4 - y if y < 0 else -4, x, 1],
        frames[0][y, -4 if x == 3 else 3, 1],
    ] < [50, 50]


@pytest.mark.parametrize("alone", [False, True])
def test_a_cover_image_is_not_taken_for_the_video(alone):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        main = container.add_stream("aac", rate=44100) if alone else container.add_stream("mpeg4", rate=10)
        if not alone:
            main.width, main.height, main.pix_fmt = 112, 56, "yuv420p"
        cover = container.add_stream("mjpeg", rate=10)
        cover.width, cover.height, cover.pix_fmt = 560, 560, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((560, 560, 3), 250, np.uint8), format="rgb24")))
        for number in range(8):
            sound = (
                av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                if alone
                else None
            )
            if sound is not None:
                sound.rate = 44100
            container.mux(
                main.encode(
                    sound
                    or av.VideoFrame.from_ndarray(np.full((56, 112, 3), 20 + 5 * number, np.uint8), format="rgb24")
                )
            )
        for stream in (cover, main):
            container.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert any(stream.disposition & av.stream.Disposition.attached_pic for stream in container.streams.video)
    if alone:
        with pytest.raises(SampleError, match="no video stream"):
            planned(file.getvalue())
    else:
        assert planned(file.getvalue())[1].shape[1:3] == (56, 112)


def test_of_several_streams_the_one_is_taken_that_players_choose():
    data = movie(second=True)
    with av.open(io.BytesIO(data)) as container:
        best = container.streams.best("video")
        assert len(container.streams.video) == 2 and best.width == 112
    _, frames = planned(data)
    assert frames.shape[1:3] == (56, 112)


def test_frames_of_a_changing_rate_are_those_shown_at_even_times():
    # Ten frames in the first second, then one a second: even times are 0, 2, 4 and 6 of 7 seconds and the last.
    times = [*range(0, 100, 10), *range(100, 800, 100)]
    plan, frames = planned(movie(times=times), max_frames=8)
    at = np.linspace(0, 7, len(plan.frames))
    witness = [max(index for index, time in enumerate(times) if time / 100 <= moment + 1e-6) for moment in at]
    assert list(plan.frames) == witness
    assert [round((float(frame.mean()) - 20) / 5) for frame in frames] == pytest.approx(witness, abs=1)
    assert plan.seconds_per_pair == pytest.approx(2 * 7 * len(times) / (len(times) - 1) / len(plan.frames), rel=0.01)


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "mov"])
def test_an_even_rate_is_no_changing_one_in_any_container(kind):
    for rate in (8, 10, 24, 30):
        file = io.BytesIO()
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
            for number in range(rate):
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(np.full((56, 56, 3), number, np.uint8), format="rgb24"))
                )
            container.mux(stream.encode())
        plan = plan_frames(Media(data=file.getvalue()), VISION, fps=4, max_frames=8, min_pixels=784, max_pixels=12544)
        assert list(plan.frames) == np.round(np.linspace(0, rate - 1, 4)).astype(int).tolist(), (kind, rate)
        assert plan.seconds_per_pair == pytest.approx(0.5, rel=0.02)


def test_formats_and_modes_equal_pillow_where_nothing_is_transparent():
    for mode, kind in itertools.product(("1", "L", "P", "RGB", "CMYK", "YCbCr"), FORMATS):
        file = io.BytesIO()
        try:
            CORNER.convert(mode).save(file, kind)
        except (OSError, ValueError, KeyError):
            continue  # this format cannot hold this mode
        data = file.getvalue()
        opened = Image.open(io.BytesIO(data))
        witness = opened.convert("RGB") if "transparency" not in opened.info else None
        if witness is not None:
            np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(witness), err_msg=f"{kind} {mode}")
