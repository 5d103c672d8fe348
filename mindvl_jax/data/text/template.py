"""A tokenizer's own chat template (Jinja), taken apart into turns.

The template is rendered once with a mark in place of each turn's text, so that what it writes itself (whose control
tokens are real) and what a user wrote (whose are not) stay apart. Then it is rendered with the texts, and both must
agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from mindvl_jax.core.errors import UserError, shortened
from mindvl_jax.data.sample import Message, SampleError
from mindvl_jax.data.text.sandbox import TemplateEnvironment

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
# Changes that published templates make to the texts they are given: none, or white space taken from their ends.
_TRIMS = (str, str.strip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))


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


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a rendering: an answer, or what stands between two answers.

    Attributes:
      turn: index of the answer's message; None between answers.
      before: what is not learned: of an answer its header. learned: text of the answer with the token that closes it.
      after: white space behind it.

    Texts are sequences of (text, whether somebody wrote it); the template's own control tokens are real, others not.
    """

    turn: int | None
    before: tuple[tuple[str, bool], ...]
    learned: tuple[tuple[str, bool], ...] = ()
    after: str = ""


class OwnTemplate:
    """Frames of conversations by a Jinja template."""

    def __init__(self, text: str, *ends: str):
        """`ends` are the texts of tokens that may close a turn, the tokenizer's end of text first.

        Raises UserError when the template does not compile.
        """
        self._ends = tuple(dict.fromkeys(ends))
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise UserError(
                f"the tokenizer's chat template does not compile: {shortened(str(error))}. Set tokenizer.template to "
                "`qwen`"
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

    def pieces(self, messages: Sequence[Message], tools: Sequence[str], *, prompt: bool) -> list[Piece]:
        """Take a conversation with tools, calls or reasoning apart at its answers.

        Tools and calls are given to the template as transformers gives them (arguments as an object).

        Args:
          prompt: the conversation is read and not learned: one piece, and reasoning may be left out.

        Raises SampleError when answers cannot be told apart, or the template leaves a text or reasoning out of a turn
        that is learned.
        """
        texts, marked, plain = [], [], []
        for message in messages:
            turn: dict[str, Any] = {"role": message.role}
            if message.calls:
                turn["tool_calls"] = [{"type": "function", "function": json.loads(call)} for call in message.calls]
            thought = {"reasoning_content": message.reasoning} if message.reasoning else {}
            written = {**thought, "content": message.content}
            plain.append({**turn, **written})
            marked.append(dict(turn))
            for name, text in written.items():
                marked[-1][name] = text and _MARK.format(len(texts))
                texts.append((len(marked) - 1, name, text))
        known = [json.loads(tool) for tool in tools] or None
        parts = _MARKS.split(self._render(marked, False, known))
        found = [int(number) for number in parts[1::2]]
        self._require_texts(messages, texts, found, prompt)
        whole = self._render(plain, False, known)
        contents = self._as_written(parts, found, texts, whole)
        sequence: list[tuple[str, bool]] = [(parts[0], False)]
        for number, text in zip(found, parts[2::2], strict=True):
            sequence += [(contents[number], True), (text, False)]
        if prompt:
            return [Piece(None, tuple(sequence))]
        return self._answers(messages, sequence)

    def _require_texts(
        self, messages: Sequence[Message], texts: list[tuple[int, str, str]], found: list[int], prompt: bool
    ) -> None:
        if found != sorted(set(found)):
            raise SampleError(
                "template",
                "the tokenizer's chat template repeats texts of the conversation, or shows them in another order; set "
                "tokenizer.template to `qwen`",
            )
        for number, (index, name, text) in enumerate(texts):
            left_out = bool(text) and number not in found
            read_only = prompt or messages[index].role != "assistant" or not messages[index].weight
            if left_out and not (name == "reasoning_content" and read_only):
                raise SampleError(
                    "template",
                    f"the tokenizer's chat template leaves out the {'reasoning' if name != 'content' else 'text'} of "
                    f"turn {index} ({messages[index].role}); split the conversation, or set tokenizer.template to "
                    "`qwen`",
                )

    def _as_written(
        self, parts: list[str], found: list[int], texts: list[tuple[int, str, str]], whole: str
    ) -> dict[int, str]:
        """The texts as the template writes them: some take white space from their ends."""
        for trim, other in itertools.product(_TRIMS, repeat=2):
            contents = {
                number: (other if texts[number][1] == "reasoning_content" else trim)(texts[number][2])
                for number in found
            }
            after = zip(found, parts[2::2], strict=True)
            if parts[0] + "".join(contents[number] + text for number, text in after) == whole:
                return contents
        raise SampleError(
            "template",
            "the tokenizer's chat template writes these turns otherwise than their texts stand; set tokenizer.template "
            "to `qwen`, or change the texts",
        )

    def _answers(self, messages: Sequence[Message], sequence: list[tuple[str, bool]]) -> list[Piece]:
        """Cut at the header that asks for an answer and at the token that closes it, in the template's own text only."""
        header = self._answer_header(("user",))
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        pieces: list[Piece] = []
        held: list[tuple[str, bool]] = []  # since the last cut
        opened = False
        for text, written in sequence:
            while not written and (at := self._cut(text, header, opened)) is not None:
                begin, end = at
                held.append((text[:begin], False))
                if opened:
                    held.append((text[begin:end], False))
                    rest = text[end:].lstrip("\n")
                    pieces[-1] = dataclasses.replace(
                        pieces[-1], learned=tuple(held), after=text[end : len(text) - len(rest)]
                    )
                    text = rest
                else:
                    turn = answers[len(pieces) // 2] if len(pieces) // 2 < len(answers) else None
                    pieces += [Piece(None, tuple(held)), Piece(turn, ((header, False),))]
                    text = text[end:]
                held, opened = [], not opened
            held.append((text, written))
        if opened or [piece.turn for piece in pieces[1::2]] != answers:
            raise SampleError(
                "template",
                f"the tokenizer's chat template opens {len(pieces) // 2} answers by {shortened(repr(header), 60)} in a "
                f"conversation that has {len(answers)}; set tokenizer.template to `qwen`",
            )
        return [*pieces, Piece(None, tuple(held))]

    def _cut(self, text: str, header: str, opened: bool) -> tuple[int, int] | None:
        """Return the index at which the next answer opens, or the open one closes."""
        ends = self._ends if opened else (header,)
        return min(((at, at + len(end)) for end in ends if (at := text.find(end)) >= 0), default=None)

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

    def _render(self, turns: list[dict[str, Any]], ask: bool, tools: list[Any] | None = None) -> str:
        try:
            return self._environment.rendered(
                self._template,
                messages=turns,
                add_generation_prompt=ask,
                tools=tools,
                bos_token="",
                eos_token=self._ends[0],
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            roles = ", ".join(turn["role"] for turn in turns)
            said = shortened(str(error) or type(error).__name__)
            raise SampleError(
                "template", f"the tokenizer's chat template refuses a conversation of {shortened(roles)}: {said}"
            ) from None


def _marked(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
