"""Answers that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

The package `llguidance` reads the grammar and the vocabulary; it is imported when the first grammar is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindvl_jax.core.errors import UserError, shortened

# Spaces as json.dumps writes them, which is what models have read. Free white space may go on without end.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must match, whole.

    Attributes:
      kind: `json` (text is a JSON schema), `regex` (of Rust's crate `regex`) or `lark` (llguidance's form of Lark).
    """

    kind: str
    text: str

    @classmethod
    def json_schema(cls, schema: dict[str, Any]) -> Grammar:
        return cls("json", json.dumps(schema))


def json_in_lark(schema: dict[str, Any]) -> str:
    """A JSON value as an expression of a Lark grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON})


class Matcher:
    """The state of one answer."""

    def __init__(self, matcher: Any, size: int):
        self._matcher, self._size = matcher, size

    @property
    def failed(self) -> bool:
        """Whether the answer cannot be continued: the grammar outgrew the package's limits."""
        return self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """(V,) bool: tokens that may come next. The end of the answer is among them once it matches."""
        found = np.zeros((self._size,), bool)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        count = min(len(bits), self._size)
        found[:count] = bits[:count]
        return found

    def accept(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens([int(token) for token in tokens])


class GrammarReader:
    """Make matchers for one vocabulary. Safe to use from several threads.

    Args:
      tokenizer: a `data.text.tokenizer.Tokenizer`. size: tokens of the model's vocabulary, padding rows included.
      end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer, size: int, end_ids: Sequence[int]):
        self._tokenizer, self._size, self._end_ids = tokenizer, size, list(end_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer.

        Raises:
          UserError: a grammar that is not valid, or uses what is not built; the package is missing.
        """
        package = _package()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary(package)
        try:
            source = {
                "json": lambda text: package.LLMatcher.grammar_from_json_schema(text, overrides=_JSON),
                "regex": package.LLMatcher.grammar_from_regex,
                "lark": package.LLMatcher.grammar_from_lark,
            }[grammar.kind](grammar.text)
            wrong, messages = package.LLMatcher.validate_grammar_with_warnings(source, self._vocabulary)
        except ValueError as error:
            wrong, messages = True, [str(error)]
        if wrong:
            reason = shortened(" ".join(messages[0].split()), 300)
            raise UserError(f"the {_NAMES[grammar.kind]} cannot be used: {reason}")
        return Matcher(package.LLMatcher(self._vocabulary, source, log_level=0), self._size)

    def _read_vocabulary(self, package) -> Any:
        tokenizer = self._tokenizer
        text = tokenizer.file.read_text(encoding="utf-8")
        if tokenizer.real_ids is None:
            return package.LLTokenizer(text, n_vocab=max(self._size, tokenizer.vocab_size), eos_token=self._end_ids)
        whole = package.LLTokenizer(text)
        names = {token: name for name, token in tokenizer.special.items()}
        compact = _Compact(
            tokens=[
                names[token].encode() if token in names else whole.decode_bytes([real])
                for token, real in enumerate(tokenizer.real_ids)
            ],
            special_token_ids=sorted(names),
            eos_token_id=self._end_ids[0],
            encode=tokenizer.encode,
        )
        return package.LLTokenizer(package.TokenizerWrapper(compact), eos_token=self._end_ids)


_NAMES = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}


@dataclasses.dataclass
class _Compact:
    """A compact vocabulary as llguidance asks for it."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    encode: Any
    bos_token_id: None = None

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        try:
            return self.encode(text)
        except UserError:  # the table lacks a token of it; llguidance then goes by single tokens
            return []


def _package():
    try:
        import llguidance
    except ImportError:
        raise UserError("answers by a grammar need the package 'llguidance': pip install 'mindvl-jax[serve]'") from None
    return llguidance
