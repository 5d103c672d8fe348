"""A tokenizer's own chat template (Jinja), taken apart into turns.

The template is rendered once with a mark in place of each turn's text, so that what it writes itself (whose control tokens
are real) and what a user wrote (whose are not) stay apart.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from typing import Any, Sequence

import jinja2
import jinja2.sandbox

from mindvl_jax.data.sample import Message
from mindvl_jax.core.errors import UserError

# Private-use characters: no text of a data set is looked for in the rendering, only these.
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the template writes around a turn's text; `after` ends with the token that closes the turn (and white space)."""

    before: str
    after: str


class OwnTemplate:
    """Frames of conversations by a Jinja template."""

    def __init__(self, text: str, end_of_turn: str):
        """`end_of_turn` is the text of the token that closes a turn. Raises UserError when the template does not compile."""
        self._end = end_of_turn
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template does not compile: {error}. Set tokenizer.template to `qwen`") from None

    def frames(self, messages: Sequence[Message]) -> list[Frame]:
        """One frame a message. Raises UserError when the template drops, repeats or reorders turns, or does not close them."""
        return list(self._frames(tuple(message.role for message in messages)))

    @functools.lru_cache(maxsize=4096)
    def _frames(self, roles: tuple[str, ...]) -> tuple[Frame, ...]:
        pieces = _MARKS.split(self._render(roles, False))
        found = [int(number) for number in pieces[1::2]]
        if found != list(range(len(roles))):
            raise UserError(f"the tokenizer's chat template shows turns {found} of a conversation of {len(roles)} ({', '.join(roles)}); each must come once, in order. Set tokenizer.template to `qwen`")
        texts = pieces[::2]
        frames, before = [], texts[0]
        for index, text in enumerate(texts[1:]):
            end = text.find(self._end)
            if end < 0:
                raise UserError(f"the tokenizer's chat template does not close turn {index} ({roles[index]}) with {self._end!r}; set tokenizer.template to `qwen`")
            end += len(self._end)
            while end < len(text) and text[end] == "\n":
                end += 1
            frames.append(Frame(before, text[:end]))
            before = text[end:]
        return tuple(frames)

    @functools.lru_cache(maxsize=1024)
    def _answer_header(self, roles: tuple[str, ...]) -> str:
        whole, asked = self._render(roles, False), self._render(roles, True)
        if not asked.startswith(whole):
            raise UserError("the tokenizer's chat template changes the conversation when an answer is asked for; set tokenizer.template to `qwen`")
        return asked[len(whole) :]

    def answer_header(self, messages: Sequence[Message]) -> str:
        """What the template writes to ask for an answer."""
        return self._answer_header(tuple(message.role for message in messages))

    def _render(self, roles: tuple[str, ...], ask: bool) -> str:
        turns: list[dict[str, Any]] = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        try:
            return self._template.render(messages=turns, add_generation_prompt=ask, tools=None, bos_token="", eos_token=self._end)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses a conversation of {', '.join(roles)}: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
