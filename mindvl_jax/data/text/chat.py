"""Conversations to token ids in the published Qwen chat format (or the tokenizer's own), turn by turn, what is learned
marked.

A turn is `<|im_start|>role`, newline, content, `<|im_end|>`, newline; an image in it is `<|vision_start|>`, one
placeholder for each merged token, `<|vision_end|>`, and so is a video, or each of its frame pairs. No system turn is
added that the sample does not have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import MEDIA_TOKENS, before_mark, literal, pieces
from mindvl_jax.data.sample import Message, SampleError
from mindvl_jax.data.text.template import TOOLS_AFTER, TOOLS_BEFORE, Frame, OwnTemplate


class TextTokenizer(Protocol):
    """Interface of a tokenizer for this module (`mindvl_jax.data.text.tokenizer.Tokenizer`)."""

    eos_id: int

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...

    def token_id(self, token: str) -> int: ...


MediumParts = Sequence[tuple[str, int]]
"""Placeholders of one medium: (text before, placeholders) of each part. One part for an image; for a video one too, or
a part for each frame pair with its time before it."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Token ids of one turn.

    Attributes:
      role: system, user or assistant.
      tokens: ids, placeholders of media included, the closing newline too.
      learned: one bool a token: part of an answer (its content and the closing `<|im_end|>`).
      weight: of the turn's loss.
      media: (offset of each part's first placeholder in `tokens`, "image" or "video") of each medium in order.
    """

    role: str
    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    media: tuple[tuple[tuple[int, ...], str], ...]
    weight: float = 1.0


class ChatEncoder:
    """Encode turns; remembers the ids of short texts, which recur in every sample (headers, common questions)."""

    def __init__(self, tokenizer: TextTokenizer, model: ModelConfig):
        self._tokenizer = tokenizer
        self._memory: dict[str, tuple[int, ...]] = {}
        own = getattr(tokenizer, "template", None) or getattr(model, "chat_template", None)
        if own is None:
            self._start, self._end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        self._adds_space = _adds_space(tokenizer)
        self._template = (
            None
            if own is None
            else OwnTemplate(own, tokenizer.decode([tokenizer.eos_id], skip_special=False), "<|im_end|>")
        )
        names = sorted(getattr(tokenizer, "special", ()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._vision = (model.vision_start_token_id, model.vision_end_token_id)
        self._pad = {"image": model.image_token_id, "video": model.video_token_id}
        names_of_media = getattr(model, "media_tokens", MEDIA_TOKENS)
        named = {key: (name, getattr(model, key)) for key, name in names_of_media.items()}
        wrong = [
            f"model.{key} is {found} but the tokenizer's {token} is {tokenizer.token_id(token)}"
            for key, (token, found) in named.items()
            if tokenizer.token_id(token) != found
        ]
        if wrong:
            raise UserError(
                "the model and the tokenizer disagree on the media tokens: "
                + "; ".join(wrong)
                + ". Use the tokenizer's ids"
            )

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of plain text; control tokens spelled in it stay text.

        Raises SampleError for what the vocabulary lacks.
        """
        known = self._memory.get(text)
        if known is None:
            try:
                known = tuple(self._tokenizer.encode(text))
            except UserError as error:
                raise SampleError("unknown_token", str(error)) from None
            if len(text) <= 256 and len(self._memory) < 65536:
                self._memory[text] = known
        return known

    def encode_template(self, text: str) -> list[int]:
        """Ids of what a template writes, control tokens and all.

        Of a text that goes on after another: a tokenizer that puts a space before every text adds the one that stands
        there already.
        """
        return self._tokenizer.encode(self._continued(text), allow_special=True)

    def _continued(self, text: str) -> str:
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def turns(
        self,
        messages: Sequence[Message],
        images: Iterator[MediumParts],
        videos: Iterator[MediumParts],
        tools: Sequence[str] = (),
        *,
        prompt: bool = False,
    ) -> list[Turn]:
        """Turns of a conversation. `images` and `videos` yield the parts of each medium in order.

        Tools stand in the system turn, their results in a user turn between `<tool_response>` tags (neighbours
        together), as the published format has them. So does reasoning: only turns after the last user turn keep it.

        Args:
          prompt: the conversation is read and not learned: reasoning of earlier turns is left out, as the published
            format does.

        Raises SampleError when a placeholder has no medium left, for reasoning that could not be learned, and for
        conversations that the tokenizer's own template does not write whole.
        """
        if self._template is not None:
            if tools or any(message.calls or message.reasoning for message in messages):
                return self._woven(messages, images, videos, tools, prompt)
            frames = self._template.frames(messages)
            return [
                self._framed(message, frame, images, videos) for message, frame in zip(messages, frames, strict=True)
            ]
        turns: list[Turn] = []
        last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
        index = 0
        if tools:
            described = literal(TOOLS_BEFORE + "\n".join(tools) + TOOLS_AFTER)
            system = messages[0].content + "\n\n" if messages[0].role == "system" else ""
            turns.append(self._turn(Message("system", system + described), images, videos))
            index = int(messages[0].role == "system")
        while index < len(messages):
            message = messages[index]
            if message.role == "tool":
                body = [message.content]
                while index + 1 < len(messages) and messages[index + 1].role == "tool":
                    index += 1
                    body.append(messages[index].content)
                turns.append(self._turn(Message("user", ""), images, videos, tool_results=body))
            else:
                if message.reasoning and index < last_user:
                    if message.weight and not prompt:
                        raise SampleError(
                            "unsupported_field",
                            f"the assistant's turn {index} has reasoning, but the format keeps it after the "
                            "last user turn only; split the conversation, or give the turn weight 0",
                        )
                    message = dataclasses.replace(message, reasoning="")
                turns.append(self._turn(message, images, videos))
            index += 1
        return turns

    def answer_header(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids that ask for an answer to a conversation: an opened assistant turn."""
        if self._template is not None:
            return tuple(self.encode_template(self._template.answer_header(messages)))
        return (self._start, *self.encode_text("assistant\n"))

    def _turn(
        self,
        message: Message,
        images: Iterator[MediumParts],
        videos: Iterator[MediumParts],
        tool_results: Sequence[str] = (),
    ) -> Turn:
        turn = _Building(self, images, videos)
        turn.add((self._start,))
        answer = message.role == "assistant"
        if tool_results:
            turn.add(self.encode_text("user"))
            for result in tool_results:
                turn.add(self.encode_text("\n"))
                turn.add(self._tag("<tool_response>"))
                turn.content(f"\n{result}\n")
                turn.add(self._tag("</tool_response>"))
        elif answer:
            # Encoded apart from the content, so that what is learned is what generation starts from.
            turn.add(self.encode_text("assistant\n"))
            turn.content(answer_text(message), learn=True)
        else:
            # The header's newline merges with newlines that open the content, as when the whole turn is encoded at
            # once.
            turn.content(f"{message.role}\n{message.content}")
        turn.add((self._end,), learn=answer)
        turn.add(self.encode_text("\n"))
        return turn.done(message.role, message.weight)

    def _framed(
        self, message: Message, frame: Frame, images: Iterator[MediumParts], videos: Iterator[MediumParts]
    ) -> Turn:
        """A turn as the tokenizer's own template has it.

        What it writes after the text up to the end of the turn is learned.
        """
        turn = _Building(self, images, videos)
        answer = message.role == "assistant"
        closing = frame.after.rstrip("\n")
        if answer:
            # Learn from where generation begins; a space between belongs to the first word.
            space = " " if frame.before.endswith(" ") and not self._template.header_ends_with_space else ""
            turn.add(self.encode_template(frame.before.removesuffix(" ") if space else frame.before))
            turn.content(self._continued(space + frame.content), learn=True)
            turn.add(self._tokenizer.encode(closing, allow_special=True), learn=True)
        else:
            # Plain text beside the content is encoded with it, as when the whole conversation is encoded at once:
            # newlines merge.
            last = max((match.end() for match in self._special.finditer(frame.before)), default=0)
            first = min((match.start() for match in self._special.finditer(closing)), default=len(closing))
            turn.add(self._tokenizer.encode(frame.before[:last], allow_special=True))
            turn.content(self._continued(literal(frame.before[last:]) + frame.content + literal(closing[:first])))
            turn.add(self._tokenizer.encode(closing[first:], allow_special=True))
        if frame.after != closing:
            turn.add(self.encode_text(frame.after[len(closing) :]))
        return turn.done("user" if message.role == "tool" else message.role, message.weight)

    def _woven(
        self,
        messages: Sequence[Message],
        images: Iterator[MediumParts],
        videos: Iterator[MediumParts],
        tools: Sequence[str],
        prompt: bool,
    ) -> list[Turn]:
        """Turns of a conversation with tools, calls or reasoning as the tokenizer's own template has it.

        What stands between two answers is one turn. Tools and calls become text of the template, whose control tokens
        are real: those that spell one are refused.
        """
        for text in (*tools, *(call for message in messages for call in message.calls)):
            if spelled := self._special.search(text):
                raise SampleError(
                    "unsupported_field",
                    f"a tool or a call spells the control token {spelled[0]!r}, which tokenizer.template `tokenizer` "
                    "would write as a real one; take it out, or use `qwen`",
                )
        turns = []
        for piece in self._template.pieces(messages, tools, prompt=prompt):
            turn = _Building(self, images, videos)
            self._weave(turn, piece.before)
            self._weave(turn, piece.learned, learn=True)
            turn.add(self.encode_text(piece.after))
            answer = None if piece.turn is None else messages[piece.turn]
            turns.append(turn.done("user", 1.0) if answer is None else turn.done("assistant", answer.weight))
        return [turn for turn in turns if turn.tokens]

    def _weave(self, turn: _Building, texts: Sequence[tuple[str, bool]], *, learn: bool = False) -> None:
        """Add texts; plain text beside what somebody wrote is encoded with it, as when all is encoded at once."""
        content = ""
        for text, written in texts:
            if written:
                content = (before_mark(content) if text.startswith(("<image>", "<video>")) else content) + text
                continue
            position = 0
            for match in self._special.finditer(text):
                turn.content(content + literal(text[position : match.start()]), learn=learn)
                turn.add(self._tokenizer.encode(match[0], allow_special=True), learn=learn)
                content, position = "", match.end()
            content += literal(text[position:])
        turn.content(content, learn=learn)

    def visual(self, kind: str, count: int) -> tuple[list[int], int]:
        """Ids of one part of a medium between its borders, if any, and where the placeholders begin in them."""
        if self._vision[0] is None:
            return [self._pad[kind]] * count, 0
        return [self._vision[0], *[self._pad[kind]] * count, self._vision[1]], 1

    def _tag(self, tag: str) -> Sequence[int]:
        try:
            return (self._tokenizer.token_id(tag),)
        except UserError:  # Qwen2.5 has no such token and writes the tag as text
            return self.encode_text(tag)


class _Building:
    """A turn being put together."""

    def __init__(self, encoder: ChatEncoder, images: Iterator[MediumParts], videos: Iterator[MediumParts]):
        self._encoder = encoder
        self._parts = {"image": images, "video": videos}
        self._tokens: list[int] = []
        self._learned: list[bool] = []
        self._media: list[tuple[tuple[int, ...], str]] = []

    def add(self, ids: Sequence[int], *, learn: bool = False) -> None:
        self._tokens.extend(ids)
        self._learned.extend([learn] * len(ids))

    def content(self, text: str, *, learn: bool = False) -> None:
        """A turn's content: text and placeholders. The text before a part is encoded with what stands before it."""
        held = ""
        for kind, part in pieces(text):
            if kind == "text":
                held += part
                continue
            parts = next(self._parts[kind], None)
            if parts is None:
                raise SampleError(
                    "media_mismatch", f"the text has more {part} placeholders than the sample has {kind}s"
                )
            offsets = []
            for before, count in parts:
                if held + before:
                    self.add(self._encoder.encode_text(held + before), learn=learn)
                held = ""
                ids, first = self._encoder.visual(kind, count)
                offsets.append(len(self._tokens) + first)
                self.add(ids)
            self._media.append((tuple(offsets), kind))
        if held:
            self.add(self._encoder.encode_text(held), learn=learn)

    def done(self, role: str, weight: float) -> Turn:
        return Turn(role, tuple(self._tokens), tuple(self._learned), tuple(self._media), weight)


def _adds_space(tokenizer: TextTokenizer) -> bool:
    """Whether a tokenizer puts a space before every text, as Llama's does."""
    for name in ("\u2581a", "\u2581"):
        try:
            if tokenizer.encode("a")[:1] == [tokenizer.token_id(name)]:
                return True
        except UserError:  # no such token, or one that a compact vocabulary leaves out
            continue
    return False


def answer_text(message: Message) -> str:
    """Write an assistant's turn as one content: its reasoning, its text and its calls of tools, as the published format
    has them.
    """
    text = message.content
    if message.reasoning:
        reasoning = message.reasoning.strip("\n")
        text = literal(f"<think>\n{reasoning}\n</think>\n\n") + text.lstrip("\n")
    for number, call in enumerate(message.calls):
        text += literal(("\n" if number or message.content else "") + f"<tool_call>\n{call}\n</tool_call>")
    return text


def check_turn_order(messages: Sequence[Message]) -> None:
    """Raise SampleError unless there is an assistant turn, no empty answer, and a system turn only at the start."""
    if not any(message.role == "assistant" for message in messages):
        raise SampleError(
            "no_answer",
            f"the conversation of {len(messages)} turns has no assistant turn, so there is nothing to learn",
        )
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise SampleError("malformed", f"turn {index} is a system turn; it may only come first")
        if message.role == "assistant" and not message.content.strip() and not message.calls:
            raise SampleError("empty_answer", f"the assistant's turn {index} is empty")
        if message.role == "assistant" and (index == 0 or messages[index - 1].role == "assistant"):
            raise SampleError("malformed", f"turn {index} is the assistant's, but no user or tool turn comes before it")
