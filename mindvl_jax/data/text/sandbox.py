"""Run a chat template of somebody else: no access to Python's inside, bounded time, bounded memory.

Jinja's sandbox keeps a template away from attributes and calls that could run code. It does not bound the work: nested
loops, macros that call each other and texts that double end the run by time or memory. Here every loop body and macro
body looks at a clock, operations that make a long text out of short ones are checked before they run, and all that one
rendering builds is counted.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Longest time of one conversation. Published templates need less than a millisecond a turn."""
LONGEST = 4 << 20
"""Longest text that a template may build; all texts of one rendering together may have 32 times that."""
_TOGETHER = 32 * LONGEST
_WIDEST = 10_000
"""Largest number that a filter or method may take as a width."""
_SIZED = frozenset({"center", "ljust", "rjust", "zfill"})
_METHODS_LEFT_OUT = frozenset({"encode", "translate", "expandtabs", "maketrans"})
_FILTERS_LEFT_OUT = (
    "format", "wordwrap", "urlize", "urlencode", "filesizeformat", "random", "batch", "slice",
    "round", "title", "striptags", "xmlattr", "wordcount", "pprint", "groupby",
)  # fmt: skip
_WIDE_FORMAT = re.compile(r"\d{4}|\*|\{[^}]*\{")


class TemplateLimit(jinja2.TemplateError):
    """A template that wants more time or memory than a chat template needs."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which published templates mark what the assistant writes: its body, as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watched(NodeTransformer):
    """Put a look at the clock into every body that can run again, and measure texts and containers that are built."""

    def _body(self, node: Any) -> Any:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_ours("tick", [nodes.Const(written)])).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _ours("joined", node.nodes).set_lineno(node.lineno)

    def _container(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _ours("made", [node]).set_lineno(node.lineno)

    visit_List = visit_Tuple = visit_Dict = _container


def _ours(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Environment of transformers' chat templates, with the limits of this module."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self._shown,
        )
        self._state = threading.local()
        for name in _FILTERS_LEFT_OUT:
            del self.filters[name]
        own = {"tojson": _tojson, "replace": _replaced, "join": _joined(self.filters["join"])}
        own |= {name: _narrow(self.filters[name]) for name in ("center", "indent")}
        for name, function in {**self.filters, **own}.items():
            self.filters[name] = self._charged(function)
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals["dict"] = lambda *args, **values: self.made(dict(*args, **values))
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(str(form)[:100])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))

    def rendered(self, template: jinja2.Template, **values: Any) -> str:
        """The text of a template.

        Raises:
          TemplateLimit: it takes longer than SECONDS or builds more than LONGEST characters.
        """
        self._state.end, self._state.built = time.monotonic() + SECONDS, 0
        pieces, length = [], 0
        for piece in template.generate(**values):
            length += len(piece)
            _fits(length)
            pieces.append(piece)
        return "".join(pieces)

    # --- what a template's text calls --------------------------------------------------------------------------------

    def tick(self, written: int = 0) -> str:
        """Called at the start of every body; `written` is the length of the plain text in it."""
        if hasattr(self._state, "end"):
            self._state.built += written
        return self._charge("")

    def joined(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        _fits(sum(map(len, texts)))
        return self._charge("".join(texts))

    def made(self, container: Any) -> Any:
        """A list, tuple or mapping, when all that it holds, shared parts counted as often as they stand, is small."""
        size, waiting = 0, [container]
        while waiting:
            value = waiting.pop()
            size += len(value) if isinstance(value, str) else 64
            _fits(size)
            if isinstance(value, dict):
                waiting += [*value, *value.values()]
            elif isinstance(value, (list, tuple)):
                waiting += value
        if hasattr(self._state, "end"):
            self._state.built += size
        return self._charge(container)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
        if operator == "+" and len(sizes) == 2:
            _fits(sum(sizes))
        elif operator == "*" and sizes:
            _fits(sizes[0] * next((value for value in (left, right) if isinstance(value, int)), 1))
        elif operator == "**" or (operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left)):
            raise TemplateLimit(f"it uses {operator!r} in a way that no chat template needs")
        elif operator == "*" and max(_bits(left), _bits(right)) > 4096:
            raise TemplateLimit("it multiplies numbers of more than 4,096 bits")
        return self._charge(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr in _METHODS_LEFT_OUT:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and getattr(value, "__name__", "").startswith("format") and _WIDE_FORMAT.search(text):
            raise TemplateLimit("it formats with a width that no chat template needs")
        return super().wrap_str_format(value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name in _SIZED and any(isinstance(value, int) and value > _WIDEST for value in args):
                raise TemplateLimit(f"it calls {name} with a width above {_WIDEST:,}")
            if name == "replace":
                return __self._charge(_replaced(owner, *args))
            if name == "join" and args:
                parts = [str(part) for part in args[0]]
                _fits(sum(map(len, parts)) + len(owner) * len(parts))
                return __self._charge(owner.join(parts))
        return __self._charge(super().call(__context, __obj, *args, **kwargs))

    # --- counting ----------------------------------------------------------------------------------------------------

    def _charge(self, value: Any) -> Any:
        """Count a value that was built; raise TemplateLimit when time or memory is used up."""
        state = self._state
        if not hasattr(state, "end"):
            return value  # folding of constants, while a template is compiled
        if time.monotonic() > state.end:
            raise TemplateLimit(f"it runs longer than {SECONDS:g} s for one conversation")
        if isinstance(value, str):
            state.built += len(value)
        elif isinstance(value, (list, tuple, dict)):
            state.built += 64 * len(value)
        if state.built > _TOGETHER:
            raise TemplateLimit(f"it builds texts of more than {_TOGETHER:,} characters for one conversation")
        return value

    def _shown(self, value: Any) -> Any:
        if isinstance(value, (list, tuple, dict)):
            self.made(value)
        return self._charge(value) if isinstance(value, str) else value

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            return self._charge(result) if isinstance(result, (str, list, tuple, dict)) else result

        return charged


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _fits(length: int) -> None:
    if length > LONGEST:
        raise TemplateLimit(f"it builds a text of {length:,} characters; at most {LONGEST:,} are taken")


def _replaced(text: Any, old: Any, new: Any, count: Any = None) -> str:
    text, old, new, most = str(text), str(old), str(new), -1 if count is None else int(count)
    found = text.count(old) if most < 0 else min(most, text.count(old))
    _fits(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, most)


def _joined(join: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(join)
    def joined(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        value = list(value)
        _fits(sum(len(str(part)) for part in value) + len(str(d)) * len(value))
        return join(context, value, d, attribute)

    return joined


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def narrow(text: Any, *args: Any, **options: Any) -> Any:
        for value in (*args, *options.values()):
            if isinstance(value, (int, str)) and (len(value) if isinstance(value, str) else value) > _WIDEST:
                raise TemplateLimit(f"it asks for a width above {_WIDEST:,}")
        lines, widest = str(text).count("\n"), next((value for value in args if isinstance(value, int)), 4)
        _fits(len(str(text)) + lines * max(int(widest), *(len(v) for v in options.values() if isinstance(v, str)), 4))
        return function(text, *args, **options)

    return narrow


def _tojson(value: Any, **options: Any) -> str:
    """JSON as transformers' templates have it: nothing is escaped for HTML."""
    indent = options.get("indent")
    if isinstance(indent, (int, str)) and (len(indent) if isinstance(indent, str) else indent) > 16:
        raise TemplateLimit("it asks for an indent above 16")
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
