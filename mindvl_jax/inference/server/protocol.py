"""Bodies of requests, and requests of the engine made from them.

Fields that would change an answer and are not built are refused by name; fields that cannot change one (`user`,
`metadata`, ...) are accepted and not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import IMAGE, VIDEO, before_mark, literal
from mindvl_jax.inference.grammar import Grammar
from mindvl_jax.inference.request import Request, Sampling
from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.settings import ServerSettings
from mindvl_jax.inference.server.tools import call_grammar

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


class CalledFunction(_Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class Call(_Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(_Body):
    """A turn. `refusal`, `audio` and `annotations` come back from clients that send an answer again."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant's messages hold tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self


class StreamOptions(_Body):
    include_usage: bool = False


class AnyText(_Body):
    type: Literal["text"]


class AnyObject(_Body):
    type: Literal["json_object"]


class Schema(_Body):
    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class BySchema(_Body):
    type: Literal["json_schema"]
    json_schema: Schema


class ByRegex(_Body):
    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1, max_length=65536)]


ResponseFormat = Annotated[AnyText | AnyObject | BySchema | ByRegex, Field(discriminator="type")]


class StructuredOutputs(_Body):
    """One of several ways to say what the answer must match."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = None

    @model_validator(mode="after")
    def _one(self):
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give one of json, regex, choice and grammar")
        return self

    def said(self) -> Grammar:
        if self.json_ is not None:
            return Grammar.json_schema(self.json_)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("regex", "|".join(map(re.escape, self.choice)))
        return Grammar("lark", self.grammar or "")


class Function(_Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class NamedFunction(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


Number = float | int
NO_DEFAULTS: Mapping[str, float] = {}


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
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self, context: int, defaults: Mapping[str, float], *, limit: int | None, top_logprobs: int
    ) -> Sampling:
        def of(name: str, given: float | None, rest: float) -> Any:
            return defaults.get(name, rest) if given is None else given

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=context if limit is None else limit,
            temperature=float(of("temperature", self.temperature, 1.0)),
            top_k=max(0, of("top_k", self.top_k, 0)),
            top_p=float(of("top_p", self.top_p, 1.0)),
            min_p=float(of("min_p", self.min_p, 0.0)),
            repetition_penalty=float(of("repetition_penalty", self.repetition_penalty, 1.0)),
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
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and not self._called():
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        if sum(map(bool, (self.format_grammar(), self.structured_outputs, self._called()))) > 1:
            raise ValueError("response_format, structured_outputs and a tool_choice that forces a call exclude another")
        return self

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def _called(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; empty when the model may choose."""
        if not self.tools or self.tool_choice in (None, "none", "auto"):
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool.function.model_dump() for tool in self.tools if named in (None, tool.function.name)]

    def format_grammar(self) -> Grammar | None:
        wanted = self.response_format
        if isinstance(wanted, AnyObject):
            return Grammar.json_schema({"type": "object"})
        if isinstance(wanted, BySchema):
            return Grammar.json_schema(wanted.json_schema.schema_ or {})
        return Grammar("regex", wanted.regex) if isinstance(wanted, ByRegex) else None

    def grammar(self) -> Grammar | None:
        """What the answer must match; None: anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.said()
        if called := self._called():
            several = not isinstance(self.tool_choice, NamedTool) and self.parallel_tool_calls is not False
            return call_grammar(called, several=several)
        return self.format_grammar()

    def sampling(self, context: int, defaults: Mapping[str, float] = NO_DEFAULTS) -> Sampling:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(context, defaults, limit=limit, top_logprobs=self.top_logprobs or 0)

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
                [TextPart(type="text", text=message.content or "")]
                if message.content is None or isinstance(message.content, str)
                else message.content
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
            role = "system" if message.role == "developer" else message.role
            calls = [call.function.model_dump() for call in message.tool_calls or ()]
            messages.append({"role": role, "content": content, **({"tool_calls": calls} if calls else {})})
        tools = [json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in self.tools or ()]
        if not self.calls_tools:
            tools = []
        highest = settings.max_pixels
        if self.max_pixels is not None:
            highest = self.max_pixels if highest is None else min(highest, self.max_pixels)
        return Request(
            messages=messages,
            images=images,
            videos=videos,
            sampling=self.sampling(context, settings.sampling),
            tools=tools,
            grammar=self.grammar(),
            id=identifier,
            min_pixels=self.min_pixels,
            max_pixels=highest,
        )


class CompletionBody(_Common):
    """Body of `/v1/completions`: text that the model continues, without a chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    echo: Literal[False] = False
    suffix: None = None
    best_of: None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def sampling(self, context: int, defaults: Mapping[str, float] = NO_DEFAULTS) -> Sampling:
        return self._sampling(
            context, defaults, limit=16 if self.max_tokens is None else self.max_tokens, top_logprobs=self.logprobs or 0
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
