"""One training sample as the rest of the data room sees it.

`record.py` makes one from a record of any accepted shape.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mindvl_jax.core.errors import UserError, shortened

ROLES = ("system", "user", "assistant", "tool")
LONGEST_MESSAGE = 1500  # of a refusal: it goes into files and onto the screen, whatever it quotes


class SampleError(UserError):
    """A sample that cannot be used.

    Attributes:
      reason: a short fixed word for counting; the message has the detail.
      sample_id: the record's own id where it could be read before the record was refused.
    """

    def __init__(self, reason: str, message: str, sample_id: str | None = None):
        super().__init__(shortened(message, LONGEST_MESSAGE))
        self.reason = reason
        self.sample_id = sample_id

    def __reduce__(self):
        return SampleError, (self.reason, str(self), self.sample_id)


@dataclasses.dataclass(frozen=True)
class Message:
    r"""One turn.

    Attributes:
      role: one of ROLES.
      content: text in which `<image>` and `<video>` mark the places of media (`\<image>` is text: see `marks.py`).
      weight: of the turn's loss; 0 is read and not learned. Of an answer only.
      reasoning: the thought before an answer, "" without one.
      calls: calls of tools that an answer ends with, each the JSON object {"name": ..., "arguments": {...}}.
    """

    role: str
    content: str
    weight: float = 1.0
    reasoning: str = ""
    calls: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Media:
    """An image or a video: encoded bytes, an already decoded object, or a path below `root`."""

    data: Any = None  # bytes, or a PIL image at inference
    path: str | None = None
    root: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation with its media.

    Attributes:
      images, videos: media in the order of their marks.
      tools: descriptions of the tools that answers may call, each a JSON object.
      origin: where it was read (file and line or row), for error messages.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    task: str | None = None
    answers: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A cell that the file's library could not read. A sample that needs it is refused with this message."""

    message: str
