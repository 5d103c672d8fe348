"""Calls of tools in the Qwen form: `<tool_call>` around a JSON object with the name and the arguments.

How tools, calls and results are written into a prompt is the chat template's part (`data/text/chat.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from mindvl_jax.inference.grammar import Grammar, json_in_lark

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


def call_grammar(functions: Sequence[dict[str, Any]], *, several: bool) -> Grammar:
    """What an answer that must call one of these functions has to match.

    Args:
      functions: `name` and `parameters` (a JSON schema) each. several: more than one call may follow another.
    """
    rules, names = [], []
    for number, function in enumerate(functions):
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        definitions = {
            key: schema["properties"]["arguments"][key]
            for key in ("$defs", "definitions")
            if key in schema["properties"]["arguments"]
        }
        names.append(f"call_{number}")
        rules.append(f"{names[-1]}: {json_in_lark({**schema, **definitions})}")
    one = f'"{OPENING}\\n" ({" | ".join(names)}) "\\n{CLOSING}"'
    return Grammar("lark", "\n".join([f'start: {one} ("\\n" {one})*' if several else f"start: {one}", *rules]) + "\n")


@dataclasses.dataclass
class ToolCall:
    """A call as far as it has been read."""

    id: str
    name: str
    arguments: str = ""

    def whole(self) -> dict:
        """As a message carries it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass
class _Arguments:
    """Where the JSON object of a call's arguments ends, found character by character."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False

    def take(self, text: str) -> int:
        """Characters of `text` that belong to the object."""
        for index, character in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped = character == "\\"
                self.quoted = character != '"'
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if not self.depth:
                    return index + 1
        return len(text)

    @property
    def ended(self) -> bool:
        return not self.depth


class ToolCallReader:
    """Divide the text of one answer into what is said and calls, as it arrives.

    A call that is no such JSON object stays text, so nothing that the model wrote is lost.

    Attributes:
      text: what has been said so far. calls: in order.
    """

    def __init__(self):
        self.text, self.calls = "", []
        self._pending = ""
        self._inside = False
        self._call: ToolCall | None = None
        self._arguments = _Arguments()

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict]]:
        """Add text; returns the newly said text and the deltas of calls in the OpenAI form."""
        self._pending += text
        said, deltas = "", []
        while self._step(deltas, part := []):
            said += "".join(part)
        said += "".join(part)
        if last:
            if self._call is None:
                said += (OPENING if self._inside else "") + self._pending
            self._pending = ""
        if self.calls:  # the line breaks around calls are the format's, not the answer's
            said = "" if not said.strip() else said
        self.text += said
        return said, deltas

    def _step(self, deltas: list[dict], said: list[str]) -> bool:
        """Read one thing from what is pending; False when more text is needed."""
        if not self._inside:
            before, found, after = self._pending.partition(OPENING)
            if found:
                said.append(before.rstrip("\n"))
                self._pending, self._inside, self._call = after, True, None
                return True
            keep = _overlap(self._pending, "\n" + OPENING, OPENING)
            said.append(self._pending[: len(self._pending) - keep])
            self._pending = self._pending[len(self._pending) - keep :]
            return False
        if self._call is None:
            return self._open(deltas, said)
        if not self._arguments.ended or not self._call.arguments:
            taken = self._arguments.take(self._pending)
            self._add(deltas, self._pending[:taken])
            self._pending = self._pending[taken:]
            if not self._arguments.ended:
                return False
        _, found, after = self._pending.partition(CLOSING)
        if found:
            self._pending, self._inside, self._call = after, False, None
        return bool(found)

    def _open(self, deltas: list[dict], said: list[str]) -> bool:
        head = _HEAD.match(self._pending)
        body, found, after = self._pending.partition(CLOSING)
        if head:
            self._pending = self._pending[head.end() :]
            self._start(deltas, json.loads(head[1]))
            return True
        if not found:
            return False
        self._pending, self._inside = after, False
        try:  # the keys in another order
            content = json.loads(body)
            name, arguments = content["name"], content.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            said.append(OPENING + body + CLOSING)
        else:
            self._start(deltas, name)
            self._add(deltas, json.dumps(arguments, ensure_ascii=False))
        return True

    def _start(self, deltas: list[dict], name: str) -> None:
        self._call, self._arguments = ToolCall(f"call_{uuid.uuid4().hex[:24]}", name), _Arguments()
        self.calls.append(self._call)
        deltas.append({"index": len(self.calls) - 1, **self._call.whole()})

    def _add(self, deltas: list[dict], arguments: str) -> None:
        if arguments:
            self.calls[-1].arguments += arguments
            deltas.append({"index": len(self.calls) - 1, "function": {"arguments": arguments}})


def _overlap(text: str, *starts: str) -> int:
    """Characters at the end of the text that may begin one of `starts`; line breaks before it are held back too."""
    for start in starts:
        for size in range(min(len(start), len(text)), 0, -1):
            if text.endswith(start[:size]):
                kept = text[: len(text) - size]
                return size + len(kept) - len(kept.rstrip("\n"))
    return 0
