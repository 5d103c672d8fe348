"""Media that stand inside a text: data URIs and bare base64."""

from __future__ import annotations

import base64
import binascii
import re

LARGEST_BYTES = 64 << 20
"""Decoded bytes of one medium in a text. Larger ones belong into files."""

# First letters in base64 of what image files begin with: JPEG, PNG, GIF, WebP (RIFF), TIFF (both orders).
_BASE64_IMAGE = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_SHORTEST_BASE64 = 48
_ALPHABET = re.compile(r"[A-Za-z0-9+/_=\s-]*")


class InlineError(ValueError):
    """A text that announces a medium and does not hold one."""


def inline_bytes(text: str) -> bytes | None:
    """Decode the medium that a text holds; None where the text is a path or a URL.

    Time is linear in the length, and a text that would decode to more than `LARGEST_BYTES` is refused before it is
    decoded.

    Raises:
      InlineError: a data URI that is not base64, damaged base64, or too large. The message never quotes the text.
    """
    if text[:5].lower() == "data:":
        comma = text.find(",", 0, 1024)
        if comma < 0 or not text[5:comma].lower().endswith(";base64"):
            raise InlineError("a data URI must have the form data:TYPE;base64,DATA")
        return decode_base64(text[comma + 1 :])
    if len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64_IMAGE) and _ALPHABET.fullmatch(text):
        return decode_base64(text)
    return None


def decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, line breaks and missing padding allowed.

    Raises InlineError as `inline_bytes`.
    """
    if len(text) // 4 * 3 > LARGEST_BYTES + LARGEST_BYTES // 16:
        raise InlineError(
            f"a medium in base64 has {len(text)} characters, above the {LARGEST_BYTES >> 20} MiB that a text "
            "may hold; save it as a file"
        )
    compact = "".join(text.split()).rstrip("=")
    if len(compact) // 4 * 3 > LARGEST_BYTES:
        raise InlineError(
            f"a medium in base64 is above the {LARGEST_BYTES >> 20} MiB that a text may hold; save it as a file"
        )
    try:
        data = compact.replace("-", "+").replace("_", "/").encode("ascii")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InlineError(f"a medium in base64 ({len(text)} characters) does not decode: {error}") from None
