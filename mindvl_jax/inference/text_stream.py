"""Detokenize a stream: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence


class TextStream:
    """Text of an answer, grown token by token.

    A character may span several tokens, so text is released only when it is complete. Text that may be the start of a
    stop string is withheld until it is decided.

    Attributes:
      tokens: all tokens so far. stopped: a stop string was seen.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._released = 0
        self._settled = 0  # tokens whose text will not change any more
        self._settled_text = ""
        self.tokens: list[int] = []
        self.stopped = False
        self._text = ""

    @property
    def text(self) -> str:
        """Text so far, up to the stop string."""
        return self._text

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """Add tokens and return the newly released text. With `last`, release everything."""
        if self.stopped:
            return ""
        for token in tokens:
            self.tokens.append(token)
            if self._stop:  # one by one: the token that completes a stop string is the last one kept
                self._decode()
                if self._find_stop():
                    return self._release(len(self._text))
        self._decode()
        end = len(self._text) if last else len(self._text) - self._held_back()
        return self._release(end)

    def _decode(self) -> None:
        # Decode from a few settled tokens back: the text of a byte-level token does not depend on what came long
        # before, so the cost does not grow with the answer.
        tail = self._tokenizer.decode(self.tokens[self._settled :])
        self._text = self._settled_text + tail
        if len(self.tokens) - self._settled > 16 and not tail.endswith("\ufffd"):
            self._settled, self._settled_text = len(self.tokens), self._text

    def _find_stop(self) -> bool:
        places = [
            place
            for place in (self._text.find(stop, max(0, self._released - len(stop))) for stop in self._stop)
            if place >= 0
        ]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True
        return self.stopped

    def _held_back(self) -> int:
        held = len(self._text) - len(self._text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return held

    def _release(self, end: int) -> str:
        new = self._text[self._released : end]
        self._released = max(self._released, end)
        return new
