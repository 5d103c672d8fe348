"""Contact sheets: some images of each file with their conversations, for a look at the data."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6
ZOOM = 2
CAPTION_LINES, LINE = 4, 12


def write_sheets(folder: Path, files: Iterable[str], pictures: int) -> None:
    """One PNG of at most `pictures` images for each of the parquet files below `folder` that has any, into
    `folder/contact`.
    """
    target = folder / "contact"
    target.mkdir(exist_ok=True)
    for path in sorted(folder / file for file in files):
        rows = _spread(path, pictures)
        if any(row["images"] for row in rows):
            sheet(rows).save(target / f"{path.parent.name}-{path.stem}.png", compress_level=1)


def _spread(path: Path, count: int) -> list[dict]:
    table = pyarrow.parquet.read_table(path)
    step = max(1, len(table) // count)
    return table.take(list(range(0, len(table), step))[:count]).to_pylist()


def sheet(rows: Sequence[dict]) -> Image.Image:
    """The images in a grid, twice their size, each over its conversation."""
    pictures = [Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB") for row in rows if row["images"]]
    captions = [_caption(row) for row in rows if row["images"]]
    width = max(max(picture.width for picture in pictures) * ZOOM, 150) + 8
    height = max(picture.height for picture in pictures) * ZOOM + CAPTION_LINES * LINE + 8
    canvas = Image.new("RGB", (width * COLUMNS, height * -(-len(pictures) // COLUMNS)), (128, 128, 140))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for index, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = index % COLUMNS * width + 4, index // COLUMNS * height + 4
        canvas.paste(
            picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST), (left, top)
        )
        lines = textwrap.wrap(caption, width // 6)[:CAPTION_LINES]
        pen.text((left, top + picture.height * ZOOM), "\n".join(lines), font=font, fill="white", spacing=1)
    return canvas


def _caption(row: dict) -> str:
    said = [message["content"].removeprefix("<image>") for message in row["messages"]]
    return " / ".join(said if row["messages"][-1]["role"] == "assistant" else [*said, row["answers"][0]])
