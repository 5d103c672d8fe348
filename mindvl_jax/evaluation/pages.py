"""HTML pages: one file each, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from mindvl_jax.core.errors import printable
from mindvl_jax.core.templates import TEMPLATES


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader([Path(__file__).parent / "templates", TEMPLATES])
    # Answers and questions are other people's text: everything is escaped.
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_plain
    )


def _plain(value: Any) -> Any:
    """Spell out control characters: a page with a null byte is no HTML."""
    return printable(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def render(template: str, **values: Any) -> str:
    """A page from a template of this package. Raises jinja2.UndefinedError for a value that the template misses."""
    return _environment().get_template(template).render(**values)


def picture_uri(picture: Image.Image | bytes, largest: int | None = None) -> str:
    """An image as a data URI; `largest` bounds its longer side (images are never enlarged)."""
    if isinstance(picture, Image.Image):
        if largest is not None and max(picture.size) > largest:
            picture = picture.copy()
            picture.thumbnail((largest, largest))
        buffer = io.BytesIO()
        if picture.width * picture.height > 200 * 200:
            picture.convert("RGB").save(buffer, format="JPEG", quality=85)
            return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        picture.save(buffer, format="PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()
