"""Check that branches lead all members of an exchange's group to it, in one order: else the program would hang.

A branch on a number of the host may be taken by some ranks and not by others. The host's part of the written program
(counters, tables, branches) is run for every place of the mesh, with exchanges as meeting points: each is passed when
all members of its group stand before it. Only programs with an exchange inside a branch are looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence

from npu_bridge.compiler.codegen.program import Assign, Branches, Exchange, Item, Loop, Stmt, walk
from npu_bridge.compiler.host_numbers import HostNumbers
from npu_bridge.compiler.ir import MeshShape

MOST = 2_000_000  # exchanges of all places together; a longer program is not followed to its end


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """One exchange as one place sees it: which statement, in which round of each loop, and who has to be there."""

    number: int
    rounds: tuple[int, ...]
    members: tuple[int, ...]


def problems(items: Sequence[Item], mesh: MeshShape, tables: Iterable[str] = ()) -> list[str]:
    """Find ranks that would deadlock; return at most one line, that of the first such collective.

    tables: lines that define the constant tables of the host.
    """
    if mesh.count == 1 or not any(_inside_a_branch(items)):
        return []
    statements: list[Stmt] = []
    lines = [*tables, "def follow(rt):", "    yield from ()", *_written(items, 1, statements)]
    scope: dict[str, Callable[[HostNumbers], Generator[tuple[int, ...]]]] = {}
    exec(compile("\n".join(lines), "<host numbers of a program>", "exec"), scope)
    meet = _Members(mesh)

    def meetings(place: int) -> Generator[_Meeting]:
        for number, *rounds in scope["follow"](HostNumbers(mesh, place)):
            for members in meet(number, statements[number], place):
                yield _Meeting(number, tuple(rounds), members)

    return _follow([meetings(place) for place in range(mesh.count)], statements, mesh)


def _inside_a_branch(items: Sequence[Item]) -> Iterable[Stmt]:
    for item in items:
        if isinstance(item, Branches):
            yield from (s for body in item.bodies for s in walk(body) if s.exchange)
        elif isinstance(item, Loop):
            yield from _inside_a_branch(item.body)


def _written(items: Sequence[Item], depth: int, statements: list[Stmt], counters: tuple[str, ...] = ()) -> list[str]:
    """The host's part of a program; an exchange yields its number in `statements` and the counters of its loops."""
    pad, lines = "    " * depth, []
    for item in items:
        if isinstance(item, Assign):
            lines.append(f"{pad}{', '.join(item.names)} = {', '.join(item.codes)}")
        elif isinstance(item, Stmt) and item.exchange:
            lines.append(f"{pad}yield {', '.join([str(len(statements)), *counters])},")
            statements.append(item)
        elif isinstance(item, Loop):
            counter = item.counter or f"round{depth}"
            inside = _written([*item.prologue, *item.body], depth + 1, statements, (*counters, counter))
            stop = int(item.start) + (1 if item.trip is None else item.trip) * item.step
            if inside:  # a loop on the device's values goes round once here
                lines += [f"{pad}for {counter} in range({item.start}, {stop}, {item.step}):", *inside]
        elif isinstance(item, Branches):
            bodies = [_written(body, depth + 1, statements, counters) for body in item.bodies]
            if any(bodies):
                for n, body in enumerate(bodies):
                    last = n == len(bodies) - 1
                    test = f"{'elif' if n else 'if'} {item.index} == {n}:" if not last or not n else "else:"
                    lines += [pad + test, *(body or [f"{pad}    pass"])]
    return lines


class _Members:
    """Return the ranks that take part in a collective, for each mesh position."""

    def __init__(self, mesh: MeshShape):
        self.host, self.known = HostNumbers(mesh, 0), {}

    def __call__(self, number: int, statement: Stmt, place: int) -> list[tuple[int, ...]]:
        if number not in self.known:
            self.known[number] = self._groups(statement.exchange)
        return [groups[place] for groups in self.known[number] if place in groups]

    def _groups(self, exchange: Exchange) -> list[dict[int, tuple[int, ...]]]:
        if exchange.pairs:
            pairs = [(s, t) for s, t in exchange.pairs if s != t]
            places = tuple(sorted({p for pair in pairs for p in pair}))
            return [dict.fromkeys(places, places)]
        found = []
        for axes in exchange.dims:
            rows = [tuple(sorted(row)) for row in self.host.groups(axes)]
            found.append({place: row for row in rows for place in row if len(row) > 1})
        return found


def _follow(walks: list[Generator[_Meeting]], statements: list[Stmt], mesh: MeshShape) -> list[str]:
    heads = [next(w, None) for w in walks]
    todo, met = list(range(mesh.count)), 0
    while todo:
        place = todo.pop()
        head = heads[place]
        if head is None or any(heads[m] != head for m in head.members):
            continue
        met += len(head.members)
        if met > MOST:
            return []
        for m in head.members:
            heads[m] = next(walks[m], None)
        todo += head.members
    stuck = [place for place, head in enumerate(heads) if head is not None]
    if not stuck:
        return []
    head = heads[stuck[0]]
    absent = next(m for m in head.members if heads[m] != head)
    return [
        f"{_described(head, statements)}: place {stuck[0]} {_where(mesh, stuck[0])} waits in it for place {absent} "
        f"{_where(mesh, absent)}, which {_doing(heads[absent], statements)}, because they take different branches; "
        "all members of an exchange's group have to reach it: move it out of the branch, or branch on what is equal "
        "in the group"
    ]


def _described(meeting: _Meeting, statements: list[Stmt]) -> str:
    statement = statements[meeting.number]
    return f"{statement.exchange.kind} at {statement.location}"


def _doing(meeting: _Meeting | None, statements: list[Stmt]) -> str:
    if meeting is None:
        return "ends without it"
    rounds = f" in round {', '.join(map(str, meeting.rounds))}" if meeting.rounds else ""
    return f"waits in {_described(meeting, statements)}{rounds}"


def _where(mesh: MeshShape, place: int) -> str:
    return ", ".join(f"{name} {at}" for name, at in HostNumbers(mesh, place).coordinates.items()).join("()")
