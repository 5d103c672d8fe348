"""One training sample as the rest of the data room sees it, and how records of the accepted shapes become one."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from mindvl_jax.config.schema import ColumnMapping
from mindvl_jax.core.errors import UserError

IMAGE, VIDEO = "<image>", "<video>"
PLACEHOLDER = re.compile(f"({IMAGE}|{VIDEO})")
ROLES = ("system", "user", "assistant", "tool")
# Role names of the shapes in circulation. A source's `columns` adds its own.
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}


class SampleError(UserError):
    """A sample that cannot be used.

    Attributes:
      reason: a short fixed word for counting; the message has the detail.
      sample_id: the record's own id where it could be read before the record was refused.
    """

    def __init__(self, reason: str, message: str, sample_id: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.sample_id = sample_id

    def __reduce__(self):
        return SampleError, (self.reason, str(self), self.sample_id)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `role` is one of ROLES; `content` marks each medium's place by `<image>` or `<video>`."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or a video: encoded bytes, an already decoded object, or a path below `root`."""

    data: Any = None  # bytes, or a PIL image at inference
    path: str | None = None
    root: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation with its media. `origin` says where it was read (file and line or row) for error messages."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    task: str | None = None
    answers: tuple[str, ...] = ()
    origin: str = ""


def sample_from_record(record: dict[str, Any], *, columns: ColumnMapping, media_root: str | None, default_id: str, origin: str) -> Sample:
    """Reads one record of any accepted shape: `messages` (MLLM, parquet, JSONL) or `conversations` (LLaVA, ShareGPT).

    Raises SampleError for a record that is not an object, has no turns, an unknown role, or media of an unknown form.
    """
    if not isinstance(record, dict):
        raise SampleError("malformed", f"a sample must be an object with named fields, found {type(record).__name__}")
    turns = record.get(columns.messages)
    if turns is None:
        turns = record.get("conversations")
    if not isinstance(turns, (list, tuple)):
        keys = ", ".join(map(str, list(record)[:8]))
        raise SampleError("malformed", f"no list of turns in {columns.messages!r} or 'conversations' (the record has: {keys}); name the column in columns.messages")
    messages = tuple(_message(turn, index, columns) for index, turn in enumerate(turns))
    system = record.get("system")
    if isinstance(system, str) and system and not any(message.role == "system" for message in messages):
        messages = (Message("system", _text(system)), *messages)
    images = record.get(columns.images)
    if images is None:
        images = record.get("image")
    videos = record.get(columns.videos)
    if videos is None:
        videos = record.get("video")
    identifier = record.get(columns.id)
    answers = record.get("answers")
    task = record.get("task")
    return Sample(
        id=default_id if identifier is None else _text(identifier),
        messages=messages,
        images=tuple(_media(item, media_root) for item in _as_list(images)),
        videos=tuple(_media(item, media_root) for item in _as_list(videos)),
        task=None if task is None else _text(task),
        answers=tuple(_text(answer) for answer in _as_list(answers)),
        origin=origin,
    )


def _message(turn: Any, index: int, columns: ColumnMapping) -> Message:
    if not isinstance(turn, dict):
        raise SampleError("malformed", f"turn {index} must be an object with a role and content, found {type(turn).__name__}")
    role = turn.get(columns.role, turn.get("from"))
    content = turn.get(columns.content, turn.get("value"))
    own = _role_names(columns)
    known = own.get(role) or ROLE_ALIASES.get(role) if isinstance(role, str) else None
    if known is None:
        raise SampleError("unknown_role", f"turn {index} has role {role!r}; known are {', '.join(sorted({*own, *ROLE_ALIASES}))} (name others in columns)")
    return Message(known, _content(content, index))


def _text(value: Any) -> str:
    """Text that is UTF-8: JSON can hold lone surrogates, which no tokenizer and no file takes."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


@functools.lru_cache(maxsize=16)
def _role_names(columns: ColumnMapping) -> dict[str, str]:
    return {columns.user: "user", columns.assistant: "assistant", columns.system: "system", columns.tool: "tool"}


def _content(content: Any, index: int) -> str:
    if isinstance(content, str):
        return _text(content)
    if isinstance(content, (list, tuple)):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append(_content(part["text"], index))
            elif kind in ("image", "image_url"):
                parts.append(IMAGE)
            elif kind in ("video", "video_url"):
                parts.append(VIDEO)
            else:
                raise SampleError("malformed", f"turn {index} has a part of type {kind!r}; expected text, image or video")
        return "".join(parts)
    raise SampleError("malformed", f"the content of turn {index} must be text, found {type(content).__name__}")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def _media(item: Any, root: str | None) -> Media:
    if isinstance(item, str):
        return Media(path=item, root=root)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return Media(data=bytes(item))
    if isinstance(item, dict):
        data, path = item.get("bytes"), item.get("path")
        path = path if isinstance(path, str) else None
        if isinstance(data, (bytes, bytearray, memoryview)):
            return Media(data=bytes(data), path=path)
        if data is None and path is not None:
            return Media(path=path, root=root)
    raise SampleError("malformed", f"a medium must be a path, bytes, or {{bytes, path}}; found {type(item).__name__}")
