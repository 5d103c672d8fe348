"""`Request`, `Sampling` and `Answer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import IMAGE, marks
from mindvl_jax.inference.grammar import Grammar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings and stop conditions.

    Attributes:
      max_new_tokens: most tokens of the answer.
      temperature: 0 is greedy; otherwise logits are divided by it before sampling.
      top_k: sample among the k most likely tokens only; 0 is no limit.
      top_p: sample inside the smallest set of tokens whose probabilities reach this mass; 1 is no limit.
      min_p: sample among tokens at least this many times as likely as the likeliest one; 0 is no limit.
      repetition_penalty: above 1 makes tokens of the prompt and of the answer so far less likely.
      presence_penalty, frequency_penalty: subtracted from the logits of tokens of the answer so far, once and for each
        occurrence.
      stop: the answer ends before the first of these strings.
      seed: the same seed gives the same answer, whatever else is in the batch. None: a seed from the request's index.
      n: number of independent answers; the prompt is read once.
      ignore_eos: run to max_new_tokens (for measurements).
      top_logprobs: also return this many of the likeliest tokens beside each token of the answer, 0 to 20.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    ignore_eos: bool = False
    top_logprobs: int = 0

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            problems.append(f"temperature is {self.temperature}, expected a number from 0 (greedy) upwards")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(
                f"repetition_penalty is {self.repetition_penalty}, expected more than 0 (1 changes nothing)"
            )
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p is {self.min_p}, expected a number from 0 (no limit) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                problems.append(f"{name} is {getattr(self, name)}, expected a number from -2 to 2 (0 changes nothing)")
        if not 0 <= self.top_logprobs <= 20:
            problems.append(f"top_logprobs is {self.top_logprobs}, expected 0 to 20")
        if self.n < 1:
            problems.append(f"n is {self.n}, expected at least 1")
        if any(not text for text in self.stop):
            problems.append("stop contains an empty string, which would end every answer at once")
        if problems:
            raise UserError("Sampling settings cannot be used: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Attributes:
      messages: chat turns `{"role": ..., "content": ...}`; each `<image>` in a content takes the next of `images`, each
        `<video>` the next of `videos` (`\\<image>` is text). A content may be a list of parts as in training data; the
        media that parts name are paths below `media_root`, `file://` URLs, data URIs or base64. The last turn is the
        user's.
      images: bytes, paths, PIL images, or objects whose `read()` returns bytes; in the order of their marks.
      id: comes back with the answer.
      min_pixels, max_pixels: image area after resizing; None is the model's own setting.
      tools: descriptions of tools that the answer may call, each a JSON object, written by the chat template.
      grammar: what the answer must match, whole; None: anything.
      adapter: name of the adapter that answers, for who drives several models; None: the model itself.
    """

    messages: Sequence[dict[str, Any]]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    sampling: Sampling = Sampling()
    id: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    media_root: str | None = None
    tools: Sequence[str] = ()
    grammar: Grammar | None = None
    adapter: str | None = None

    @classmethod
    def from_prompt(cls, prompt: str, images: Sequence[Any] = (), **rest) -> Request:
        """Build a request of one user turn. Images without a mark in the prompt go before the text, in order."""
        marked = marks(prompt).count(IMAGE)
        missing = len(images) - marked
        if missing < 0:
            raise UserError(
                f"The prompt marks {marked} images with <image> but {len(images)} were given; give one "
                "image for each mark."
            )
        return cls(messages=[{"role": "user", "content": "<image>" * missing + prompt}], images=tuple(images), **rest)


def with_system(request: Request, text: str) -> Request:
    """Return the request with a system turn, unless it has one."""
    if any(turn["role"] == "system" for turn in request.messages):
        return request
    return dataclasses.replace(request, messages=[{"role": "system", "content": text}, *request.messages])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of a request.

    Attributes:
      id: the request's id; sample: which of its `n` answers.
      text: decoded text, without special tokens and without the stop string.
      tokens: generated ids of the model's vocabulary, the end token included when it was produced.
      logprobs: natural log-probability of each token under the model (temperature 1, no penalties).
      alternatives: for each token the likeliest (id, log-probability) pairs, likeliest first; empty unless
        `top_logprobs` asked.
      finish: `stop` (end token or stop string), `length` (max_new_tokens, or the context is full) or `error`.
      prompt_tokens: tokens of the prompt, visual tokens included.
      error: reason of a failed request, when the caller asked to skip such requests.
    """

    id: str
    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    prompt_tokens: int
    error: str | None = None
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
