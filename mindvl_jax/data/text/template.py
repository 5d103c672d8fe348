"""A tokenizer's own chat template (Jinja), taken apart into turns.

The template is rendered once with a mark in place of each turn's text, so that what it writes itself (whose control
tokens are real) and what a user wrote (whose are not) stay apart. Then it is rendered with the texts, and both must
agree.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from mindvl_jax.core.errors import UserError, shortened
from mindvl_jax.data.sample import Message, SampleError

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""Text around tool descriptions in the system turn of the published Qwen2.5 and Qwen3 formats."""

QWEN_TEMPLATE = """\
{%- macro text(message) %}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{%- set state = namespace(last_user=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set state.last_user = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- text(messages[0]) + '\\n\\n' }}{%- endif %}
{{- BEFORE }}
{%- for tool in tools %}{{- ('' if loop.first else '\\n') + (tool | tojson) }}{%- endfor %}
{{- AFTER + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if tools and loop.first and message.role == 'system' %}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + text(message) + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.reasoning_content and loop.index0 > state.last_user %}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + text(message).lstrip('\\n') }}
{%- else %}
{{- text(message) }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function else call %}
{{- ('\\n' if not loop.first or message.content else '') + '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".replace("BEFORE", json.dumps(TOOLS_BEFORE)).replace("AFTER", json.dumps(TOOLS_AFTER))
"""The published Qwen chat format as `chat.py` writes it, without the system turn that some releases add."""

# Private-use characters: no text of a data set is looked for in the rendering, only these.
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Template text around a turn; `after` ends with the token that closes the turn (and white
    space).

    Attributes:
      content: the turn's text as the template takes it: some strip white space from its ends.
    """

    before: str
    after: str
    content: str = ""


class OwnTemplate:
    """Frames of conversations by a Jinja template."""

    def __init__(self, text: str, *ends: str):
        """`ends` are the texts of tokens that may close a turn, the tokenizer's end of text first.

        Raises UserError when the template does not compile.
        """
        self._ends = tuple(dict.fromkeys(ends))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(
                f"the tokenizer's chat template does not compile: {error}. Set tokenizer.template to `qwen`"
            ) from None

    def frames(self, messages: Sequence[Message]) -> list[Frame]:
        """One frame a message.

        Raises SampleError when the template drops, repeats or reorders turns, does not close them, or changes their
        texts by more than white space at their ends.
        """
        frames = self._frames(tuple(message.role for message in messages))
        contents = [message.content for message in messages]
        whole = self._render([{"role": message.role, "content": message.content} for message in messages], False)
        for kept in (contents, [content.strip() for content in contents]):
            if (
                "".join(frame.before + content + frame.after for frame, content in zip(frames, kept, strict=True))
                == whole
            ):
                return [
                    dataclasses.replace(frame, content=content) for frame, content in zip(frames, kept, strict=True)
                ]
        raise SampleError(
            "template",
            "the tokenizer's chat template writes these turns otherwise than their texts stand (a thought "
            "taken out of an answer, for instance); set tokenizer.template to `qwen`, or change the texts",
        )

    @functools.lru_cache(maxsize=4096)  # noqa: B019  a process has one template, which lives as long as it
    def _frames(self, roles: tuple[str, ...]) -> tuple[Frame, ...]:
        pieces = _MARKS.split(self._render(_marked(roles), False))
        found = [int(number) for number in pieces[1::2]]
        if found != list(range(len(roles))):
            raise SampleError(
                "template",
                f"the tokenizer's chat template shows turns {found} of a conversation of {len(roles)} "
                f"({', '.join(roles)}); each must come once, in order. Set tokenizer.template to `qwen`",
            )
        texts = pieces[::2]
        frames, before = [], texts[0]
        for index, text in enumerate(texts[1:]):
            closings = [(at, -len(end)) for end in self._ends if (at := text.find(end)) >= 0]
            last = index == len(roles) - 1
            if not closings and roles[index] != "assistant" and (last or text.strip()):
                # Nothing closes the turn: what follows opens the next one, or ends the conversation.
                frames.append(Frame(before, text if last else ""))
                before = text
                continue
            if not closings:
                raise SampleError(
                    "template",
                    f"the tokenizer's chat template does not close turn {index} ({roles[index]}) with "
                    f"{' or '.join(map(repr, self._ends))}; set tokenizer.template to `qwen`",
                )
            at, length = min(closings)
            end = at - length
            while end < len(text) and text[end] == "\n":
                end += 1
            frames.append(Frame(before, text[:end]))
            before = text[end:]
        return tuple(frames)

    @functools.lru_cache(maxsize=1024)  # noqa: B019  as above
    def _answer_header(self, roles: tuple[str, ...]) -> str:
        whole, asked = self._render(_marked(roles), False), self._render(_marked(roles), True)
        if not asked.startswith(whole):
            raise SampleError(
                "template",
                "the tokenizer's chat template changes the conversation when an answer is asked for; set "
                "tokenizer.template to `qwen`",
            )
        return asked[len(whole) :]

    @property
    def header_ends_with_space(self) -> bool:
        return self._answer_header(("user",)).endswith(" ")

    def answer_header(self, messages: Sequence[Message]) -> str:
        """Return the template's generation prompt."""
        return self._answer_header(tuple(message.role for message in messages))

    def _render(self, turns: list[dict[str, Any]], ask: bool) -> str:
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=ask, tools=None, bos_token="", eos_token=self._ends[0]
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            roles = ", ".join(turn["role"] for turn in turns)
            raise SampleError(
                "template", f"the tokenizer's chat template refuses a conversation of {shortened(roles)}: {error}"
            ) from None


def _marked(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
