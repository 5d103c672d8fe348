"""Bodies of requests, and requests of the engine made from them.

Fields that would change an answer and are not built are refused by name; fields that cannot change one (`user`,
`metadata`, ...) are accepted and not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import IMAGE, VIDEO, before_mark, literal
from mindvl_jax.inference.request import Request, Sampling
from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.settings import ServerSettings

HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class URL(_Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: URL


class VideoPart(_Body):
    type: Literal["video_url"]
    video_url: URL


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    name: None = None


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: Literal["text"]


Number = float | int


class _Common(_Body):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, context: int, *, limit: int | None, top_logprobs: int) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=context if limit is None else limit,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=float(self.min_p or 0),
            repetition_penalty=float(self.repetition_penalty or 1),
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            stop=stop,
            seed=self.seed,
            n=self.n or 1,
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
        )


class ChatBody(_Common):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def sampling(self, context: int) -> Sampling:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(context, limit=limit, top_logprobs=self.top_logprobs or 0)

    def request(
        self, identifier: str, settings: ServerSettings, context: int, read: Callable[[str, str], bytes]
    ) -> Request:
        """The engine's request. `read(url, param)` gives the bytes of a medium.

        Raises:
          HTTPError: too many images, or one that cannot be read.
        """
        messages, images, videos = [], [], []
        for index, message in enumerate(self.messages):
            content = ""  # with marks for media; what the client wrote stays text, whatever it spells
            for place, part in enumerate(
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            ):
                where = f"messages[{index}].content[{place}]"
                if isinstance(part, TextPart):
                    content += literal(part.text)
                    continue
                if message.role != "user":
                    raise HTTPError(400, f"{where}: only user messages can hold images and videos", param=where)
                if len(images) + len(videos) >= settings.images:
                    raise HTTPError(
                        400, f"{where}: a request can hold at most {settings.images} images and videos", param=where
                    )
                if isinstance(part, ImagePart):
                    images.append(read(part.image_url.url, f"{where}.image_url"))
                    content = before_mark(content) + IMAGE
                else:
                    videos.append(read(part.video_url.url, f"{where}.video_url"))
                    content = before_mark(content) + VIDEO
            messages.append({"role": message.role, "content": content})
        highest = settings.max_pixels
        if self.max_pixels is not None:
            highest = self.max_pixels if highest is None else min(highest, self.max_pixels)
        return Request(
            messages=messages,
            images=images,
            videos=videos,
            sampling=self.sampling(context),
            id=identifier,
            min_pixels=self.min_pixels,
            max_pixels=highest,
        )


class CompletionBody(_Common):
    """Body of `/v1/completions`: text that the model continues, without a chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    suffix: None = None
    best_of: None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def sampling(self, context: int) -> Sampling:
        return self._sampling(
            context, limit=16 if self.max_tokens is None else self.max_tokens, top_logprobs=self.logprobs or 0
        )


def parse(kind: type[_Common], content: Any) -> Any:
    """A checked body.

    Raises:
      HTTPError: 400 with every problem and the first field at fault.
    """
    if not isinstance(content, dict):
        raise HTTPError(400, f"the body must be a JSON object, found {type(content).__name__}")
    try:
        body = kind.model_validate(
            {key: value for key, value in content.items() if key not in HARMLESS and value is not None}
        )
        body.sampling(1)  # its own checks, before anything is read
        return body
    except UserError as error:
        raise HTTPError(400, str(error)) from None
    except ValidationError as error:
        problems = [_describe(one) for one in error.errors(include_url=False, include_input=False)]
        raise HTTPError(400, "; ".join(text for _, text in problems[:5]), param=problems[0][0] or None) from None


_UNION_STEPS = frozenset({"text", "str", "int", "float", "function-after"})
"""Steps of an error's location that name a member of a union, not a field of the body."""


def _describe(error: dict) -> tuple[str, str]:
    place = ""
    for step in error["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step not in _UNION_STEPS and not step.startswith(("list[", "constrained")):
            place += ("." if place else "") + step
    if error["type"] == "extra_forbidden":
        return place, f"`{place}` is not supported by this server"
    return place, f"`{place}`: {error['msg'].removeprefix('Value error, ')}"
