"""Exchanges that run beside the computation: gathers start before what comes ahead of their first reader, scatters are
waited for late, permutes and all_to_alls start where their operand is there and are waited for at their first reader.

Every all_gather over one dimension becomes a ``start_all_gather`` and a ``wait``, every reduce_scatter a
``start_reduce_scatter`` and a ``wait``. A start moves ahead of the computation, a wait stays at the first use of its
result (of a gather), or moves behind the computation that follows (of a scatter). The order of exchanges is one order
for all ranks, as collectives want it.

Memory stays bounded: of each kind at most `AHEAD` exchanges are under way in a block, so a program holds at most
`AHEAD` gathered parameters more than one that waits for each (and as many gradients before their scatter). Nothing
crosses a loop: a gather that is read behind a loop starts behind it, and what a loop's body reads is gathered in the
same round. Permutes and all_to_alls may pass loops and branches, at most `PASSING` at once: what is under way then is
the little that a ring or a pipeline hands on, and a round waits at its end for what the next one reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from npu_bridge.compiler.ir import Block, Op, Program, Value, free_values

AHEAD = 2
PASSING = 8

# What lies between a parameter and its gather: cheap, on this device's shard, and safe to do earlier than it was
# written.
_CARRIED_ALONG = frozenset({"convert", "reshape", "transpose", "slice", "dynamic_slice", "relabel", "all_slice"})
# What may wait for a scattered gradient behind other computation.
_PUT_OFF = frozenset({"convert", "reshape", "transpose", "relabel"})
_LOOPS = frozenset({"while", "case"})


def overlap_exchanges(program: Program) -> None:
    """Rewrite every block in place. Runs last: it fixes an order that later rewrites must keep."""
    for block in _blocks(program.body):
        _start_gathers_early(block, program)
        _start_where_the_operand_is(block, program)
        _wait_for_scatters_late(block, program)


def _blocks(block: Block) -> Iterator[Block]:
    """Blocks of loops and branches before the one that holds them. The body of a reduction has no exchanges."""
    for op in block.ops:
        for region in op.regions:
            yield from _blocks(region)
    yield block


def _reads(op: Op) -> list[Value]:
    return [*op.operands, *itertools.chain.from_iterable(free_values(r) for r in op.regions)]


def _over_one_dim(op: Op, name: str, program: Program) -> bool:
    return op.name == name and sum(program.mesh.size(tuple(axes)) > 1 for axes in op.attrs["dims"]) == 1


def _split(op: Op) -> tuple[Op, Op]:
    """The start and the wait that take an exchange's place.

    The wait names the operand again: its storage is read until then, so nothing may overwrite it in between.
    """
    moved = op.operands[0].type if op.name == "reduce_scatter" else op.result.type
    start = Op(
        f"start_{op.name}", list(op.operands), [Value(moved, op.result.layout)], dict(op.attrs), location=op.location
    )
    return start, Op(
        "wait",
        [start.result, op.operands[0]],
        [op.result],
        {"of": op.name, "dims": op.attrs.get("dims", [])},
        location=op.location,
    )


# ---- gathers
# --------------------------------------------------------------------------------------------------------------


class _Gathers:
    """The gathers of one block in the order of their first readers, while the block is written anew."""

    def __init__(self, block: Block, program: Program):
        self.inside = {id(op) for op in block.ops}
        self.written: set[int] = set()
        self.kept: list[Op] = []
        self.of = {op.result: op for op in block.ops if _over_one_dim(op, "all_gather", program)}
        self.loops_before: dict[Value, int] = {}
        loops = 0
        for op in block.ops:
            for v in _reads(op):
                if v in self.of:
                    self.loops_before.setdefault(v, loops)
            loops += op.name in _LOOPS
        for v in block.results:
            if v in self.of:
                self.loops_before.setdefault(v, loops)
        self.queue = list(self.loops_before)  # by first reader; a gather that nobody reads is not there
        self.under_way: dict[Value, Op] = {}  # gathered value -> its wait
        self.arrived: set[Value] = set()
        self.loops = 0

    def write(self, op: Op) -> None:
        if id(op) not in self.written:
            self.written.add(id(op))
            self.kept.append(op)

    def _chain(self, v: Value) -> list[Op] | None:
        """Operations to write before `v` is there, in order; None when one of them may not be moved, or reads a gather
        that is under way.
        """
        made = v.producer
        if v in self.of:
            return [] if v in self.arrived else None
        if made is None or id(made) not in self.inside or id(made) in self.written:
            return []
        scalar = not any(r.shape for r in made.results) and all(not o.shape for o in made.operands)
        if made.regions or not (made.name in _CARRIED_ALONG or scalar):
            return None
        found: list[Op] = []
        for operand in made.operands:
            before = self._chain(operand)
            if before is None:
                return None
            found += before
        return [*found, made]

    def _source(self, v: Value) -> Value:
        """The value behind remat's barriers, which are not written: a recomputed layer's weights need not wait for its
        gradient.
        """
        while v.producer is not None and id(v.producer) in self.inside and v.producer.name == "optimization_barrier":
            v = v.producer.operands[v.producer.results.index(v)]
        return v

    def start_next(self) -> None:
        """Starts as many of the next gathers as may be under way and have their operand."""
        while self.queue and len(self.under_way) < AHEAD and self.loops_before[self.queue[0]] == self.loops:
            chain = self._chain(self._look_behind_barriers(self.of[self.queue[0]]))
            if chain is None:
                return
            for op in chain:
                self.write(op)
            self.start(self.queue[0])

    def _look_behind_barriers(self, op: Op) -> Value:
        """Lets the operand's chain read what barriers were given, and returns the operand."""
        todo = [op]
        while todo:
            at = todo.pop()
            at.operands = [self._source(v) for v in at.operands]
            for v in at.operands:
                made = v.producer
                if (
                    made is not None
                    and id(made) in self.inside
                    and id(made) not in self.written
                    and made.name in _CARRIED_ALONG
                ):
                    todo.append(made)
        return op.operands[0]

    def start(self, value: Value) -> None:
        self.queue.remove(value)
        start, self.under_way[value] = _split(self.of[value])
        self.kept.append(start)

    def need(self, value: Value) -> None:
        """Somebody reads a gathered value now."""
        if value in self.queue:  # could not start early
            self.start(value)
        if value in self.under_way:
            self.kept.append(self.under_way.pop(value))
            self.arrived.add(value)


def _start_gathers_early(block: Block, program: Program) -> None:
    if not any(_over_one_dim(op, "all_gather", program) for op in block.ops):
        return
    gathers = _Gathers(block, program)
    for op in block.ops:
        if gathers.of.keys() & set(op.results):
            continue
        for v in _reads(op):
            gathers.need(v)
        gathers.start_next()  # beside the operation that is about to be written
        gathers.write(op)
        gathers.loops += op.name in _LOOPS
    for v in block.results:
        gathers.need(v)
    block.ops = gathers.kept


# ---- permutes and all_to_alls
# ------------------------------------------------------------------------------------------------------------


def _passes(op: Op, program: Program) -> bool:
    if op.name == "all_to_all":
        return program.mesh.size(tuple(op.attrs["axes"])) > 1
    return op.name == "permute" and any(source != target for source, target in op.attrs["pairs"])


def _start_where_the_operand_is(block: Block, program: Program) -> None:
    """Rewrite one block. The order of starts follows from the block alone, so it is the same on every rank."""
    waiting = {op.result: op for op in block.ops if _passes(op, program)}
    if not waiting:
        return
    inside = {id(op) for op in block.ops}
    written: set[int] = set()
    kept: list[Op] = []
    under_way: dict[Value, Op] = {}  # result -> its wait

    def there(v: Value) -> bool:
        return v.producer is None or id(v.producer) not in inside or id(v.producer) in written

    def write(op: Op) -> None:
        kept.append(op)
        written.add(id(op))

    def chain(v: Value) -> list[Op] | None:
        """Cheap operations to write before `v` is there, in order; None when it is not to be had yet."""
        if v in waiting or v in under_way:
            return None
        if there(v):
            return []
        made = v.producer
        if made.regions or made.name not in _CARRIED_ALONG:
            return None
        found: list[Op] = []
        for operand in made.operands:
            before = chain(operand)
            if before is None:
                return None
            found += [op for op in before if op not in found]
        return [*found, made]

    def start(result: Value) -> None:
        begin, under_way[result] = _split(waiting.pop(result))
        kept.append(begin)

    def start_all() -> None:
        for result, op in list(waiting.items()):
            if len(under_way) == PASSING:
                return
            before = chain(op.operands[0])
            if before is not None:
                for needed in before:
                    write(needed)
                start(result)

    def need(v: Value) -> None:
        if v in waiting:  # could not start early
            need(waiting[v].operands[0])
            start(v)
        if v in under_way:
            wait = under_way.pop(v)
            write(wait)

    for op in block.ops:
        if id(op) in written or _passes(op, program):
            continue
        for v in _reads(op):
            need(v)
        start_all()  # beside the operation that is about to be written
        if id(op) not in written:
            write(op)
    for v in block.results:
        need(v)
    for v in list(waiting):  # nobody reads them, but the other devices of their group may wait for them
        need(v)
    for v in list(under_way):
        need(v)
    block.ops = kept


# ---- scatters
# ---------------------------------------------------------------------------------------------------------------


def _wait_for_scatters_late(block: Block, program: Program) -> None:
    if not any(_over_one_dim(op, "reduce_scatter", program) for op in block.ops):
        return
    kept: list[Op] = []
    under_way: list[list[Op]] = []  # a wait and what was put off behind it, oldest first
    of: dict[Value, list[Op]] = {}  # value that is not there yet -> its entry

    def finish(entry: list[Op]) -> None:
        under_way.remove(entry)
        for op in entry:
            kept.append(op)
            for r in op.results:
                of.pop(r, None)

    for op in block.ops:
        late = list({id(of[v]): of[v] for v in _reads(op) if v in of}.values())
        if op.name in _PUT_OFF and len(late) == 1:
            late[0].append(op)
            of[op.result] = late[0]
            continue
        for entry in late:
            finish(entry)
        if op.name in _LOOPS:
            for entry in list(under_way):
                finish(entry)
        if _over_one_dim(op, "reduce_scatter", program):
            if len(under_way) == AHEAD:
                finish(under_way[0])
            start, wait = _split(op)
            kept.append(start)
            under_way.append([wait])
            of[op.result] = under_way[-1]
        else:
            kept.append(op)
    for entry in list(under_way):
        finish(entry)
    block.ops = kept
