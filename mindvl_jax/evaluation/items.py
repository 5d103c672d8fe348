"""One question of a task, wherever it came from."""

from __future__ import annotations

import dataclasses
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import plain
from mindvl_jax.data.sample import Message, Sample
from mindvl_jax.inference import Request, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its accepted answers.

    Attributes:
      id: unique in its task; predictions are kept under it.
      messages: chat turns up to the question. images: bytes, paths, PIL images or Media, in the order of their marks.
      answers: accepted answers; what makes an answer right is the scorer's business.
      category: group that is also reported apart; empty for none.
      extra: what a scorer needs besides (options, pair ids).
    """

    id: str
    messages: tuple[dict[str, str], ...]
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def request(self, sampling: Sampling, **pixels) -> Request:
        return Request(
            messages=self.messages, images=self.images, videos=self.videos, sampling=sampling, id=self.id, **pixels
        )

    @property
    def question(self) -> str:
        """The last turn's text, without the marks of media."""
        return plain(self.messages[-1]["content"]).strip()


def item_from_sample(sample: Sample) -> Item:
    """A training-format sample as a question: a conversation that ends with the question and keeps its answers apart,
    or what comes before the last assistant turn.

    Raises:
      UserError: nothing to compare with.
    """
    if sample.tools or any(turn.calls or turn.reasoning for turn in sample.messages):
        raise UserError(
            f"{sample.origin or sample.id}: the sample has tools, calls or reasoning, which evaluation tasks "
            "do not compare"
        )
    turns = list(sample.messages)
    if sample.answers and turns and turns[-1].role == "user":
        turns.append(Message("assistant", sample.answers[0]))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise UserError(
            f"{sample.origin or sample.id}: an evaluation sample needs a question and an assistant turn with its answer"
        )
    answers = sample.answers or (plain(turns[-1].content),)
    return Item(
        id=sample.id,
        messages=tuple({"role": turn.role, "content": turn.content} for turn in turns[:-1]),
        images=sample.images,
        videos=sample.videos,
        answers=tuple(answers),
        category="",
    )
