"""Statements of the torch program before printing: operands, aliases, and storages that may be overwritten.

The memory plan chooses the printed form of each statement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from npu_bridge.compiler.ir import Location, Type


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sent to other devices: over groups along each of `dims` in turn, or between `pairs` of places."""

    kind: str
    dims: tuple[tuple[str, ...], ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass
class Stmt:
    """``outs = code``.

    alias: the first result may share storage with this variable (a view).
    expands: the view repeats elements, so it must not be written through.
    inplace: (variables overwritten, code), best first, usable when their storages are otherwise dead. A result takes
    over the storage of the variable at the same index.
    """

    outs: list[str]
    code: str
    ins: list[str]
    types: list[Type]
    alias: str | None = None
    expands: bool = False
    inplace: list[tuple[tuple[str, ...], str]] = dataclasses.field(default_factory=list)
    location: Location = Location()
    kind: str = ""  # "collective", "kernel" or the operation's name
    constant: bool = False  # the result aliases a constant of the program, which must not be overwritten
    host: bool = False  # the results lie in the host's memory
    held: bool = False  # operands on the device are read beside what follows: nothing may overwrite them
    ahead_bytes: int = 0  # on the device, for what a loop's next round reads
    exchange: Exchange | None = None  # where it begins; what waits for its end has none


@dataclasses.dataclass
class Loop:
    """``for counter in range(trip)`` or, when `trip` is None, a loop whose `condition` is read from the device every
    time.

    carries: (parameter, initial value, value for the next round). After the loop the parameters hold the results.
    """

    counter: str
    trip: int | None
    carries: list[tuple[str, str, str]]
    body: list[Item]
    types: list[Type]
    prologue: list[Item] = dataclasses.field(default_factory=list)
    condition: str = ""
    start: str = "0"
    step: int = 1

    @property
    def outs(self) -> list[str]:
        return [c[0] for c in self.carries]


@dataclasses.dataclass
class Assign:
    """``names = codes``: Python numbers that the host computes between statements. No storage."""

    names: list[str]
    codes: list[str]

    outs: tuple[str, ...] = ()


@dataclasses.dataclass
class Branches:
    """``if index == 0: .. elif ..``: one of several bodies, chosen by a host number; the last one for any other number.

    results: for each body the variables that become `outs`.
    """

    index: str
    bodies: list[list[Item]]
    results: list[list[str]]
    outs: list[str]
    types: list[Type]
    location: Location = Location()


@dataclasses.dataclass
class Function:
    """A nested function without free variables: a reduction body without a torch operator."""

    name: str
    params: list[str]
    lines: list[str]
    results: list[str]

    outs: tuple[str, ...] = ()


Item = Stmt | Loop | Function | Assign | Branches


def reads(item: Item) -> set[str]:
    """Return the variables that an item reads from outside."""
    if isinstance(item, Stmt):
        return set(item.ins)
    if isinstance(item, (Function, Assign)):
        return set()
    if isinstance(item, Branches):
        return set().union(*(_needs(body, results) for body, results in zip(item.bodies, item.results)))
    inner: set[str] = set()
    defined: set[str] = set(item.outs)
    for part in (*item.prologue, *item.body):
        inner |= reads(part)
        defined |= set(part.outs)
    inner |= {c[2] for c in item.carries} | ({item.condition} if item.condition else set())
    return {c[1] for c in item.carries} | (inner - defined)


def _needs(body: list[Item], results: list[str]) -> set[str]:
    """Return the outer variables that a body and its results read."""
    inner = set(results).union(*(reads(part) for part in body))
    return inner - {o for part in body for o in part.outs}


def has_effect(item: Item) -> bool:
    """Whether an item has side effects."""
    return any(s.kind == "effect" for s in walk([item]))


def remove_dead(items: list[Item], live: set[str]) -> list[Item]:
    """Dead code elimination. `live`: variables needed afterwards; extended in place."""
    kept: list[Item] = []
    for item in reversed(items):
        read = isinstance(item, (Function, Assign)) or not item.outs or any(o in live for o in item.outs)
        if not read and not has_effect(item):
            continue
        if isinstance(item, Branches):
            used = [n for n, o in enumerate(item.outs) if o in live]
            item.outs, item.types = [item.outs[n] for n in used], [item.types[n] for n in used]
            item.results = [[r[n] for n in used] for r in item.results]
            item.bodies = [remove_dead(body, set(results)) for body, results in zip(item.bodies, item.results)]
        if isinstance(item, Loop):
            wanted = {c[2] for c in item.carries}
            item.body = remove_dead(item.body, set(wanted))
            item.prologue = remove_dead(item.prologue, {item.condition} if item.condition else set())
        live |= reads(item)
        kept.append(item)
    return kept[::-1]


def walk(items: list[Item]) -> Iterator[Stmt]:
    """Yield every statement, including those of loops (once)."""
    for item in items:
        if isinstance(item, Stmt):
            yield item
        elif isinstance(item, Loop):
            yield from walk(item.prologue)
            yield from walk(item.body)
        elif isinstance(item, Branches):
            for body in item.bodies:
                yield from walk(body)
