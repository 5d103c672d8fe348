"""Answers of the engine in the forms of the OpenAI interface."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mindvl_jax.inference.generator import Piece
from mindvl_jax.inference.request import Answer
from mindvl_jax.inference.server.tools import ToolCallReader


def token_text(tokenizer, token: int) -> tuple[str, list[int]]:
    """A token's text and its bytes; bytes that are no whole character show as the replacement character."""
    text = tokenizer.decode([token], skip_special=False)
    return text, list(text.encode("utf-8"))


def chat_logprobs(tokenizer, part: Answer | Piece) -> dict:
    """The `logprobs` of a choice for the tokens of an answer or of a piece of one."""
    content = []
    for index, token in enumerate(part.tokens):
        text, content_bytes = token_text(tokenizer, token)
        others = part.alternatives[index] if index < len(part.alternatives) else ()
        alternatives = []
        for other_token, logprob in others:
            other, other_bytes = token_text(tokenizer, other_token)
            alternatives.append({"token": other, "logprob": logprob, "bytes": other_bytes})
        content.append(
            {"token": text, "logprob": part.logprobs[index], "bytes": content_bytes, "top_logprobs": alternatives}
        )
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer, answer: Answer | Piece, start: int = 0) -> dict:
    """The `logprobs` of a choice of `/v1/completions`; `start`: characters of the tokens before a piece."""
    texts = [token_text(tokenizer, token)[0] for token in answer.tokens]
    offsets, position = [], start
    for text in texts:
        offsets.append(position)
        position += len(text)
    top = [{token_text(tokenizer, token)[0]: logprob for token, logprob in pairs} for pairs in answer.alternatives]
    return {
        "tokens": texts,
        "token_logprobs": list(answer.logprobs),
        "top_logprobs": top or None,
        "text_offset": offsets,
    }


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict:
    completion = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion, "total_tokens": prompt_tokens + completion}


def envelope(identifier: str, kind: str, model: str, choices: list[dict], **rest) -> dict:
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": model, "choices": choices, **rest}


def chat_choice(tokenizer, answer: Answer, *, logprobs: bool, tools: bool = False) -> dict:
    """A choice of a whole answer. With `tools`, calls in its text are told apart from it."""
    text: str | None = answer.text
    called: dict = {}
    if tools:
        reader = ToolCallReader()
        reader.push(answer.text, last=True)
        text = reader.text
        if reader.calls:
            text, called = text or None, {"tool_calls": [call.whole() for call in reader.calls]}
    return {
        "index": answer.sample,
        "message": {"role": "assistant", "content": text, "refusal": None, **called},
        "logprobs": chat_logprobs(tokenizer, answer) if logprobs else None,
        "finish_reason": finish_reason(answer, bool(called)),
    }


def finish_reason(answer: Answer, called: bool) -> str:
    return "tool_calls" if called and answer.finish == "stop" else answer.finish


def chat_delta(
    sample: int,
    text: str,
    *,
    first: bool = False,
    finish: str | None = None,
    logprobs: dict | None = None,
    calls: Sequence[dict] = (),
) -> dict:
    delta: dict = {"role": "assistant"} if first else {}
    if text or first:
        delta["content"] = text
    if calls:
        delta["tool_calls"] = list(calls)
    return {"index": sample, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
