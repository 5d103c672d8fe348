"""Buffer donation, in-place updates and lifetimes of variables.

Every variable belongs to a *storage*; views share it. A statement runs in place if the overwritten storage is owned by
this call (allocated or donated), is not read later under any name, and no other operand aliases it. Variables are
deleted after their last use, so torch's allocator can reuse the memory, and the peak is known before anything runs.

Constants belong to the program: they are never overwritten, and results that alias them are cloned.

Loops: a carried value that the body overwrites must own its storage exclusively on entry: no other carried value may
alias it, and the body may not read it under another name. Otherwise it is copied on entry. Copies are counted, because
a training step should have none.

Branches: each body is planned independently, since only one runs.
"""

from __future__ import annotations

import dataclasses

from npu_bridge.compiler.codegen.program import Assign, Branches, Function, Item, Loop, Stmt, reads
from npu_bridge.compiler.ir import Type

UNDER_WAY = 2  # copies to host memory whose sources may still be held (`runtime/host_memory.py`)
Source = Stmt | Loop | Assign | None  # origin of a line


@dataclasses.dataclass
class Plan:
    """The printed body and the results of the plan."""

    lines: list[tuple[int, str, Source]]  # indentation, code, origin
    results: list[str] = dataclasses.field(default_factory=list)  # code of each result
    inplace: int = 0
    copies: int = 0
    peak_bytes: int = 0
    argument_bytes: int = 0
    host_bytes: int = 0  # peak of the host's memory


class _Storages:
    """Live storages and their sizes; tracks the peak."""

    def __init__(self) -> None:
        self.root: dict[str, str] = {}
        self.names: dict[str, set[str]] = {}
        self.size: dict[str, int] = {}
        self.live = self.peak = 0
        self.hosted: set[str] = set()  # storages in the host's memory
        self.host_live = self.host_peak = 0

    def save(self) -> tuple:
        return dict(self.root), {r: set(n) for r, n in self.names.items()}, dict(self.size), (self.live, self.host_live)

    def restore(self, state: tuple) -> None:
        root, names, size, (self.live, self.host_live) = state
        self.root, self.names, self.size = dict(root), {r: set(n) for r, n in names.items()}, dict(size)

    def add(self, name: str, root: str, size: int) -> None:
        self.drop(name)
        self.root[name] = root
        if root not in self.names:
            self.names[root] = set()
            self.size[root] = size
            self._count(root, size)
        self.names[root].add(name)

    def drop(self, name: str) -> None:
        root = self.root.get(name)
        if root is None or name not in self.names.get(root, ()):
            return
        self.names[root].discard(name)
        if not self.names[root]:
            del self.names[root]
            self._count(root, -self.size.pop(root))

    def _count(self, root: str, size: int) -> None:
        if root in self.hosted:
            self.host_live += size
            self.host_peak = max(self.host_peak, self.host_live)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)


class _Later:
    """Variables that are live after a position of a block."""

    def __init__(self, last_read: dict[str, int], position: int):
        self.last_read, self.position = last_read, position

    def __contains__(self, name: str) -> bool:
        return self.last_read.get(name, -1) > self.position


class Planner:
    def __init__(self, params: dict[str, Type], donated: set[str], hosted: set[str] | None = None):
        self.plan = Plan([])
        self.store = _Storages()
        self.types: dict[str, Type] = dict(params)
        self.expanded: set[str] = set()
        self.constants: set[str] = set()  # storages of the program's constants
        self.donated = donated
        self.store.hosted |= hosted or set()
        self.ahead_bytes = self.most_ahead = 0  # fetched from host memory for a loop's next round: this loop's, at most
        self.held_bytes = 0  # the largest source of a copy to host memory
        self.owned = {p for p in params if p in donated}
        for name, type in params.items():
            self.store.add(name, name, type.bytes)
        self.plan.argument_bytes = self.store.live

    def run(self, items: list[Item], results: list[str]) -> Plan:
        params = set(self.types)
        used = set().union(set(results), *(reads(i) for i in items)) if items else set(results)
        unused = sorted(params - used, key=lambda p: int(p[1:]))
        if unused:
            self.line(1, f"del {', '.join(unused)}")
            for p in unused:
                self.store.drop(p)
        self.block(items, set(results), self.owned, 1, params - set(unused))
        self.plan.results = [self.copy_of(r) if self.root[r] in self.constants else r for r in results]
        self.plan.peak_bytes = self.store.peak + max(self.most_ahead, self.ahead_bytes) + UNDER_WAY * self.held_bytes
        self.plan.host_bytes = self.store.host_peak
        return self.plan

    def line(self, indent: int, code: str, source: Source = None) -> None:
        self.plan.lines.append((indent, code, source))

    def copy_of(self, name: str) -> str:
        return f"rt.memory.clone({name})" if self.root.get(name) in self.store.hosted else f"{name}.clone()"

    @property
    def root(self) -> dict[str, str]:
        return self.store.root

    def block(
        self, items: list[Item], live_out: set[str], owned: set[str], indent: int, deletable: set[str]
    ) -> set[str]:
        """Plan items in order.

        `deletable`: variables of this scope that may be deleted here. Returns overwritten storages that were not
        allocated in this block.
        """
        last_read = {v: n for n, item in enumerate(items) for v in reads(item)} | dict.fromkeys(live_out, len(items))
        made: set[str] = set()
        dirty: set[str] = set()
        for position, item in enumerate(items):
            later = _Later(last_read, position)
            if isinstance(item, Function):
                self.line(indent, f"def {item.name}({', '.join(item.params)}):")
                for text in item.lines:
                    self.line(indent + 1, text)
                self.line(indent + 1, f"return {', '.join(item.results)}{',' if len(item.results) > 0 else ''}")
                continue
            if isinstance(item, Assign):
                self.line(indent, f"{', '.join(item.names)} = {', '.join(item.codes)}", item)
                continue
            if isinstance(item, Branches):
                dead = self.branches(item, later, owned, made, dirty, indent, deletable)
            elif isinstance(item, Stmt):
                self.statement(item, later, owned, made, dirty, indent)
                dead = [v for v in dict.fromkeys(item.ins) if v not in later and v in deletable]
                deletable.update(o for o in item.outs if o in later)
                dead += [o for o in item.outs if o not in later and o not in dead]
            else:
                dead = self.loop(item, later, owned, made, dirty, indent, deletable)
            if dead:
                self.line(indent, f"del {', '.join(dead)}")
                deletable -= set(dead)
                for v in dead:
                    self.store.drop(v)
        return dirty

    def shared(self, root: str, later: _Later) -> bool:
        """Whether any alias of this storage is read later."""
        return any(v in later for v in self.store.names.get(root, ()))

    def statement(self, s: Stmt, later: _Later, owned: set[str], made: set[str], dirty: set[str], indent: int) -> None:
        code, taken = s.code, None
        # Prefer a donated argument's storage: then the state keeps its buffers from step to step.
        for names, form in sorted(s.inplace, key=lambda o: not any(self.root.get(n) in self.donated for n in o[0])):
            roots = [self.root[n] for n in names if n]
            others = [self.root[i] for i in s.ins if i not in names and i in self.root]
            free = all(r in owned and not self.shared(r, later) and r not in others for r in roots)
            alone = len(set(roots)) == len(roots) and all(s.ins.count(n) == 1 for n in names if n)
            if free and alone and not any(n in self.expanded for n in names):
                code, taken = form, names
                self.plan.inplace += 1
                dirty.update(r for r in roots if r not in made)
                break
        if s.inplace and taken is None and ".clone(" in code:
            self.plan.copies += 1
        for i, (out, type) in enumerate(zip(s.outs, s.types)):
            if taken and taken[i]:
                root = self.root[taken[i]]
            elif s.alias:
                root = self.root[s.alias]
            else:
                root = out
                made.add(out)
                if s.host:
                    self.store.hosted.add(out)
                if s.constant:
                    self.constants.add(out)
                else:
                    owned.add(out)
            self.store.add(out, root, type.bytes)
            self.types[out] = type
            if s.expands or (s.alias and s.alias in self.expanded):
                self.expanded.add(out)
        self.ahead_bytes += s.ahead_bytes
        if s.held:
            held = [i for i in s.ins if self.root.get(i) not in self.store.hosted]
            self.held_bytes = max([self.held_bytes, *(self.types[i].bytes for i in held)])
            owned.difference_update(self.root[i] for i in held if i in self.root)
        self.line(indent, f"{', '.join(s.outs)} = {code}" if s.outs else code, s)

    def branches(
        self,
        s: Branches,
        later: _Later,
        owned: set[str],
        made: set[str],
        dirty: set[str],
        indent: int,
        deletable: set[str],
    ) -> list[str]:
        """Plan each body independently, since only one runs.

        A body may overwrite and return storages owned outside that are not read later.
        """
        free = {r for r in owned if not self.shared(r, later)}
        before = self.store.save()
        peak = self.store.peak
        for n, (body, results) in enumerate(zip(s.bodies, s.results)):
            self.store.restore(before)
            last = n == len(s.bodies) - 1
            self.line(
                indent,
                "else:"
                if last and n
                else f"{'elif' if n else 'if'} {s.index} == {n}:"
                if len(s.bodies) > 1
                else "if True:",
            )
            inner_owned = set(free)
            changed = self.block(body, set(results), inner_owned, indent + 1, set())
            self.store.hosted.update(o for o, name in zip(s.outs, results) if self.root[name] in self.store.hosted)
            ends: list[str] = []
            taken: set[str] = set()
            for name in results:
                r = self.root[name]
                if r in taken or r not in inner_owned or name in self.expanded:
                    ends.append(self.copy_of(name))
                    self.plan.copies += 1
                else:
                    taken.add(r)
                    ends.append(name)
            dirty.update(r for r in changed | (taken & free) if r not in made)
            if s.outs:
                self.line(indent + 1, f"{', '.join(s.outs)} = {', '.join(ends)}")
            else:
                self.line(indent + 1, "pass")
            mine = [v for item in body for v in item.outs if v in self.root and v in results and v not in s.outs]
            if mine:
                self.line(indent + 1, f"del {', '.join(dict.fromkeys(mine))}")
            peak = max(peak, self.store.peak)
        self.store.restore(before)
        self.store.peak = max(peak, self.store.peak)
        for out, type in zip(s.outs, s.types):
            self.store.add(out, out, type.bytes)
            self.types[out] = type
            owned.add(out)
            made.add(out)
        # Storages that a body may have overwritten or returned are dead afterwards, like names read only by this item.
        owned -= {r for r in free if r in dirty or r in self.consumed(s)}
        dead = [v for v in sorted(reads(s)) if v not in later and v in deletable]
        deletable.update(o for o in s.outs if o in later)
        return dead + [o for o in s.outs if o not in later]

    def consumed(self, s: Branches) -> set[str]:
        """Return the storages that the bodies consume."""
        return {self.root[v] for v in reads(s) if v in self.root}

    def loop(
        self, s: Loop, later: _Later, owned: set[str], made: set[str], dirty: set[str], indent: int, deletable: set[str]
    ) -> list[str]:
        params, inits, yields = ([c[i] for c in s.carries] for i in range(3))
        header = len(self.plan.lines)
        if s.trip is None:
            self.line(indent, "while True:", s)
        elif s.trip > 0:
            stop = int(s.start) + s.trip * s.step
            spec = (
                f"{stop}"
                if s.start == "0" and s.step == 1
                else f"{s.start}, {stop}" + (f", {s.step}" if s.step != 1 else "")
            )
            self.line(indent, f"for {s.counter} in range({spec}):", s)
        # Inside, each carried value is assumed to own its storage; the copies on entry that this requires are added
        # below.
        inner_owned = set(params)
        ahead, self.ahead_bytes = self.ahead_bytes, 0
        for p, i in zip(params, inits):
            if self.root[i] in self.store.hosted:
                self.store.hosted.add(p)
            self.store.add(p, p, 0)
            self.types[p] = self.types[i]
        inner_deletable: set[str] = set(params)
        wanted = set(yields)
        changed: set[str] = set()
        if s.trip is None:
            body_needs = set().union(wanted, *(reads(b) for b in s.body)) | set(params)
            changed |= self.block(s.prologue, body_needs | {s.condition}, inner_owned, indent + 1, set())
            self.line(indent + 1, f"if not bool({s.condition}): break  # reads the device")
        changed |= self.block(s.body, wanted, inner_owned, indent + 1, inner_deletable)
        self.most_ahead, self.ahead_bytes = max(self.most_ahead, self.ahead_bytes), ahead
        # At the end of a round every carried value must own its storage again.
        ends: list[str] = []
        taken: set[str] = set()
        for y in yields:
            r = self.root[y]
            if r in taken or r not in inner_owned or y in self.expanded:
                ends.append(self.copy_of(y))
                self.plan.copies += 1
            else:
                taken.add(r)
                ends.append(y)
        begins = self._loop_begins(
            s, later, owned, made, dirty, changed | {self.root[y] for y, e in zip(yields, ends) if e == y}
        )
        head: list[tuple[int, str, Source]] = []
        if params:
            head.append((indent, f"{', '.join(params)} = {', '.join(begins)}", None))
        dead = [v for v in dict.fromkeys(inits) if v not in later and v in deletable and v not in reads_of_bodies(s)]
        if dead:
            head.append((indent, f"del {', '.join(dead)}", None))
            deletable -= set(dead)
        self.plan.lines[header:header] = head
        self.line(indent + 1, f"{', '.join(params)} = {', '.join(ends)}" if params else "pass")
        extra = [y for y in dict.fromkeys(yields) if y not in params and y in self.root and y not in reads_of_bodies(s)]
        if extra:
            self.line(indent + 1, f"del {', '.join(extra)}")
        for y in extra:
            self.store.drop(y)
        for v in dead:
            self.store.drop(v)
        for p, type in zip(params, s.types):
            self.store.add(p, p, type.bytes)
            owned.add(p)
            made.add(p)
        deletable.update(p for p in params if p in later)
        outer_reads = reads(s) - set(inits)
        leftover = [v for v in inits if v in reads_of_bodies(s)]
        return [p for p in params if p not in later] + [
            v
            for v in dict.fromkeys([*sorted(outer_reads), *leftover])
            if v not in later and v in deletable and v not in params
        ]

    def _loop_begins(
        self, s: Loop, later: _Later, owned: set[str], made: set[str], dirty: set[str], taken: set[str]
    ) -> list[str]:
        """Return code of the initial values; copy those that the body overwrites or returns (`taken`, names of carried
        values) unless their storage is free.
        """
        read_inside = {self.root[v] for v in reads_of_bodies(s) if v in self.root}
        needs_own = [p in taken or s.trip is None for p, _, _ in s.carries]
        starts_shared = {self.root[i] for (_, i, _), own in zip(s.carries, needs_own) if not own}
        begins: list[str] = []
        gone: set[str] = set()  # storages taken by earlier carried values
        for (_, i, _), own in zip(s.carries, needs_own):
            r = self.root[i]
            free = (
                r in owned
                and not self.shared(r, later)
                and r not in gone | starts_shared | read_inside
                and i not in self.expanded
            )
            if own and not free:
                begins.append(self.copy_of(i))
                self.plan.copies += 1
                continue
            begins.append(i)
            if own:
                gone.add(r)
                if r not in made:
                    dirty.add(r)
        return begins


def reads_of_bodies(s: Loop) -> set[str]:
    inner: set[str] = set()
    defined = set(s.outs)
    for part in (*s.prologue, *s.body):
        inner |= reads(part)
        defined |= set(part.outs)
    return (inner | {c[2] for c in s.carries}) - defined
