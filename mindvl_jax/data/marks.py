r"""The marks `<image>` and `<video>` in a text, and how a text says that it means the letters.

A backslash before a mark makes it ordinary text: `\<image>` reads as the seven letters. To write a backslash in front
of a real mark, double it. In a list of content parts nothing needs a backslash: media are parts of their own there, so
text is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

IMAGE, VIDEO = "<image>", "<video>"
MEDIA_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Key of a configuration -> name of the token in Qwen's vocabularies."""
_MARK = re.compile(r"(\\*)(<image>|<video>)")


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Split a text at its marks: ("text", letters without the backslashes), ("image", mark) and ("video", mark), in
    order.
    """
    letters, position = "", 0
    for match in _MARK.finditer(text):
        slashes, mark = match.groups()
        letters += text[position : match.start()] + "\\" * (len(slashes) // 2)
        position = match.end()
        if len(slashes) % 2:
            letters += mark
            continue
        if letters:
            yield "text", letters
        yield ("image" if mark == IMAGE else "video"), mark
        letters = ""
    letters += text[position:]
    if letters:
        yield "text", letters


def marks(text: str) -> list[str]:
    """Return the marks of a text in order, without those that are ordinary text."""
    return [mark for slashes, mark in _MARK.findall(text) if len(slashes) % 2 == 0]


def literal(text: str) -> str:
    """Return a content that reads as exactly these letters, whatever marks are spelled in them."""
    return _MARK.sub(lambda match: match[1] * 2 + "\\" + match[2], text)


def before_mark(content: str) -> str:
    """Return a content to which a mark can be appended: its last backslashes would otherwise belong to the mark."""
    return content + "\\" * (len(content) - len(content.rstrip("\\")))


def plain(content: str) -> str:
    """Return the letters of a content, without its marks and without the backslashes of spelled ones."""
    return "".join(piece for kind, piece in pieces(content) if kind == "text")
