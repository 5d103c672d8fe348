"""Read a file of requests, one JSON object a line, and check it before any weights are opened."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_text
from mindvl_jax.data.record import conversation, media_of
from mindvl_jax.data.sample import Media
from mindvl_jax.inference.request import Request, Sampling

SHOWN = 10  # number of problems printed for a file


class _Form(BaseModel):
    # Strict: "5" is not 5. JSON distinguishes numbers from text, so a wrong type is an error in the file.
    model_config = ConfigDict(extra="forbid", strict=True)


class _Turn(_Form):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]


class _Question(_Form):
    """`prompt` or `messages`, and optional images and videos."""

    id: str | int | None = None
    prompt: str | None = None
    messages: Annotated[list[_Turn], Field(min_length=1)] | None = None
    images: list[str] = []
    videos: list[str] = []
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> _Question:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either `prompt` or `messages`")
        return self

    def request(self, number: int, root: Path, common: Mapping[str, Any], pixels: Mapping[str, int | None]) -> Request:
        given = self.model_dump(exclude_none=True)
        sampling = Sampling(**{**common, **{key: given[key] for key in Sampling.__dataclass_fields__ if key in given}})
        images, videos = (tuple(_named(name, root) for name in names) for names in (self.images, self.videos))
        rest = dict(
            sampling=sampling,
            media_root=str(root),
            id=str(number if self.id is None else self.id),
            videos=videos,
            adapter=self.adapter,
            **{key: given.get(key, value) for key, value in pixels.items()},
        )
        if self.prompt is not None:
            return Request.from_prompt(self.prompt, images, **rest)
        messages = [turn.model_dump() for turn in self.messages]
        media = ([media for media in group if isinstance(media, Media)] for group in (images, videos))
        conversation(messages, *media, media_root=str(root))  # refused here, before any weights are opened
        return Request(messages=messages, images=images, **rest)


def _named(name: str, root: Path) -> str | Media:
    """Resolve a medium of a line: a path relative to the file's folder, or the bytes of a data URI."""
    media = media_of(name, None)
    return str(root / media.path) if media.data is None else media


# Every setting of Sampling; None where a line leaves it to the command line. A single stop may be a plain string.
_Line = create_model(
    "_Line",
    __base__=_Question,
    **{
        name: (str | list[str] | None if name == "stop" else kind | None, None)
        for name, kind in get_type_hints(Sampling).items()
    },
)


def read_requests(path: str, common: Mapping[str, Any], pixels: Mapping[str, int | None]) -> list[Request]:
    """Read requests from a JSONL file ("-": standard input). A line's settings override the common ones.

    Args:
      common: default sampling settings. pixels: default min_pixels and max_pixels.

    Raises:
      UserError: unreadable file, or invalid lines, all listed.
    """
    if path != "-" and not Path(path).is_file():
        raise UserError(f"there is no file {path!r}; --requests wants a JSONL file, one request a line")
    try:
        # Not splitlines: a JSON string may hold U+2028 and other separators as they are.
        lines = (sys.stdin.read().removeprefix("\ufeff") if path == "-" else read_text(path)).split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from None
    requests, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(_Line.model_validate_json(line).request(number, Path(path).parent, common, pixels))
        except ValidationError as error:
            problems.append(f"  line {number}: {'; '.join(_told(one) for one in error.errors())}")
        except UserError as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        what = (
            f"1 line of {path} is no request"
            if len(problems) == 1
            else f"{len(problems)} lines of {path} are no requests"
        )
        raise UserError(f"{what}:\n" + "\n".join(problems[:SHOWN]) + ("\n  ..." if len(problems) > SHOWN else ""))
    if not requests:
        raise UserError(f"{path} holds no request")
    return requests


def _told(error: Mapping[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown `{place}`; known are {', '.join((_Turn if '.' in place else _Line).model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"`{place}`: {message}" if place else message
