"""Loops and branches.

A ``while`` whose counter starts at a number, steps by a number and is compared with a number becomes a Python ``for``:
its counter is a host integer, slices at it are views, nothing synchronises. Any other condition would have to be read
from the device every round; that is refused unless `allow_host_sync` says otherwise.

Carried values that the host can compute from the counter, the device's index and constant tables are carried on the
host.

A ``case`` on a host number becomes a Python ``if``. On a device value every branch runs and results are selected, which
needs no synchronisation and can be captured.
"""

from __future__ import annotations

import dataclasses

from npu_bridge.compiler.codegen.branches import branches, host_code
from npu_bridge.compiler.codegen.emitter import LARGEST_TABLE, Emitter, LoopState, lowering
from npu_bridge.compiler.codegen.operands import HostInt, HostTable, Literal, Operand, Tensor
from npu_bridge.compiler.codegen.program import Assign, Loop
from npu_bridge.compiler.ir import FLOATS, Block, Op, Type, Value, calls_back


@dataclasses.dataclass
class _Counted:
    position: int
    start: int
    trip: int
    step: int


def _literal(block: Block, value: Value, outer: dict[Value, Operand]) -> int | None:
    if value.producer is not None and value.producer.name == "constant" and "splat" in value.producer.attrs:
        return int(value.producer.attrs["splat"])
    known = outer.get(value)
    return int(known.value) if isinstance(known, Literal) else None


def _counted(e: Emitter, op: Op, args: list[Operand]) -> _Counted | None:
    """Return the counter of a loop whose trip count is known at compile time, or None."""
    condition, body = op.regions
    test = condition.results[0].producer
    if (
        test is None
        or test.name != "compare"
        or test.attrs["comparison_direction"] not in ("LT", "LE", "NE", "GT", "GE")
    ):
        return None
    x, y = test.operands
    if x not in condition.params:
        return None
    i = condition.params.index(x)
    limit = _literal(condition, y, e.env)
    if limit is None and y in condition.params:  # the limit is carried unchanged
        j = condition.params.index(y)
        if body.results[j] is body.params[j] and isinstance(args[j], Literal):
            limit = int(args[j].value)
    start = args[i]
    update = body.results[i].producer
    if limit is None or not isinstance(start, Literal) or update is None or update.name not in ("add", "subtract"):
        return None
    a, b = update.operands
    if a is not body.params[i] and update.name == "add":
        a, b = b, a
    step = _literal(body, b, e.env)
    if a is not body.params[i] or not step:
        return None
    step = step if update.name == "add" else -step
    first = int(start.value)
    direction = test.attrs["comparison_direction"]
    if direction in ("LT", "LE") and step > 0:
        count = (limit + (direction == "LE") - first + step - 1) // step
    elif direction in ("GT", "GE") and step < 0:
        count = (first - limit + (direction == "GE") - step - 1) // -step
    elif direction == "NE" and (limit - first) % step == 0 and (limit - first) // step >= 0:
        count = (limit - first) // step
    else:
        return None
    return _Counted(i, first, max(count, 0), step)


@lowering("while")
def while_(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    counted = _counted(e, op, args)
    if counted is None:
        if not e.allow_host_sync:
            e.problem(
                op,
                "the number of rounds depends on data on the device, which costs a host synchronisation "
                "every round and cannot be "
                "captured; use lax.scan or a fixed fori_loop, or compile with allow_host_sync=True",
            )
            return [Literal(0, r.type) for r in op.results]
        return _device_loop(e, op, args)
    if counted.trip == 0:
        return args
    body = op.regions[1]
    counter = e.fresh("i")
    last = counted.start + (counted.trip - 1) * counted.step
    outs: list[Operand | None] = [None] * len(args)
    carried: list[int] = []
    for i, (param, result, arg) in enumerate(zip(body.params, body.results, args)):
        if i == counted.position:
            low, high = sorted((counted.start, last))
            e.env[param] = HostInt(counter, param.type, low, high)
            outs[i] = Literal(last + counted.step, op.results[i].type)
        elif result is param:  # carried unchanged: use the initial value inside and afterwards
            e.env[param] = outs[i] = arg
        else:
            carried.append(i)
    on_host = [i for i in carried if _known_to_host(args[i]) and _may_stay_on_host(e, body, body.results[i])]
    while True:  # repeat until every value treated as a host number is one at the end of a round too
        state = e.save()
        loop, results = _write_rounds(e, op, args, counter, counted, carried, on_host)
        wrong = [i for i in on_host if not isinstance(results[i], (HostInt, HostTable))]
        if not wrong:
            break
        e.restore(state)
        on_host = [i for i in on_host if i not in wrong]
    e.items.append(loop)
    for i in carried:
        outs[i] = results[i]
    return outs


def _write_rounds(
    e: Emitter, op: Op, args: list[Operand], counter: str, counted: _Counted, carried: list[int], on_host: list[int]
) -> tuple[Loop, dict[int, Operand]]:
    """Write the loop; return it and the operand of each carried value after it. A literal or tensor means: not a host
    number.
    """
    body = op.regions[1]
    tensors = [i for i in carried if i not in on_host]
    inits = {i: e.tensor(args[i]) for i in tensors}
    params: dict[int, Operand] = {i: Tensor(e.fresh("c"), body.params[i].type) for i in tensors}
    names = {i: e.fresh("h") for i in on_host}
    for i in on_host:
        type = body.params[i].type
        params[i] = e.host_variable(names[i], type) if type.shape else HostInt(names[i], type)
        e.items.append(Assign([names[i]], [_host_value(args[i])]))
    for i in carried:
        e.env[body.params[i]] = params[i]
    last = counted.start + (counted.trip - 1) * counted.step
    e.loops.append(LoopState(counter, counted.step, last, frozenset(params[i].name for i in tensors)))
    with e.nested(counted.trip) as items:
        e.block(body)
        e.loops.pop()
        yields = {i: e.tensor(e.env[body.results[i]]) for i in tensors}
        ends = {i: e.env[body.results[i]] for i in on_host}
        kept = [i for i in on_host if _known_to_host(ends[i])]
        if kept:
            items.append(Assign([names[i] for i in kept], [_host_value(ends[i]) for i in kept]))
    carries = [(params[i].name, inits[i].name, yields[i].name) for i in tensors]
    loop = Loop(
        counter,
        counted.trip,
        carries,
        items,
        [op.results[i].type for i in tensors],
        start=str(counted.start),
        step=counted.step,
    )
    return loop, {i: params[i] if i in tensors or i in kept else ends[i] for i in carried}


def _known_to_host(value: Operand) -> bool:
    """Whether the operand is a host number or an unsharded host table."""
    if isinstance(value, Tensor) or value.type.dtype in FLOATS or value.type.size > LARGEST_TABLE:
        return False
    if isinstance(value, HostTable):
        return value.offset == "0" and value.type.shape == value.whole
    return isinstance(value, Literal) or value.type.shape == ()


def _host_value(value: Operand) -> str:
    if isinstance(value, HostTable):
        return value.name
    return f"({host_code(value)},) * {value.type.size}" if value.type.shape else host_code(value)


# Operations that the host can evaluate when it knows their operands.
_ON_HOST = frozenset(
    {
        "add",
        "subtract",
        "multiply",
        "maximum",
        "minimum",
        "select",
        "and",
        "or",
        "not",
        "clamp",
        "remainder",
        "divide",
        "negate",
        "convert",
        "compare",
        "reshape",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "constant",
        "partition_id",
        "case",
        "optimization_barrier",
        "relabel",
    }
)


def _may_stay_on_host(e: Emitter, body: Block, result: Value) -> bool:
    """Whether a carried value may be known to the host.

    Cheap and optimistic: a wrong guess only makes the loop be written twice.
    """
    todo, seen = [result], set()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v.producer is None or (v not in e.env and v.producer.name in _ON_HOST):
            known = e.env.get(v) if v.producer is None and v not in body.params else None
            if isinstance(known, Tensor) or v.dtype in FLOATS:
                return False
            todo += v.producer.operands if v.producer is not None else []
        elif isinstance(e.env.get(v), Tensor) or v not in e.env:
            return False
    return True


def _device_loop(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    condition, body = op.regions
    inits = [e.tensor(a) for a in args]
    params = [Tensor(e.fresh("c"), p.type) for p in body.params]
    for block in (condition, body):
        e.env.update(zip(block.params, params))
    with e.nested() as prologue:
        e.block(condition)
        test = e.tensor(e.env[condition.results[0]])
    with e.nested() as items:
        e.block(body)
        yields = [e.tensor(e.env[r]) for r in body.results]
    carries = [(p.name, i.name, y.name) for p, i, y in zip(params, inits, yields)]
    e.items.append(Loop("", None, carries, items, [r.type for r in op.results], prologue, test.name))
    return list(params)


@lowering("case")
def case(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    index = args[0]
    regions = op.regions
    if isinstance(index, Literal):
        chosen = int(index.value)
        region = regions[chosen if 0 <= chosen < len(regions) else len(regions) - 1]
        e.block(region)
        return [e.env[r] for r in region.results]
    if isinstance(index, Tensor) and any(calls_back(o) for region in regions for o in region.ops):
        # A callback runs only in the chosen branch (it may raise in another); the host waits for it in any case.
        name = e.fresh("h")
        e.emit_many(f"{name} = int({index.name})", [index], [], kind="effect")
        index = HostInt(name, index.type)
    if isinstance(index, HostInt):
        bodies = []
        for region in regions:
            with e.nested() as items:
                e.block(region)
            bodies.append((items, [e.env[r] for r in region.results]))
        return branches(e, index, bodies, op)
    if any(r.host for r in op.results):
        e.problem(op, "branches that the device chooses have results in host memory; move them to the device first")
    index = e.tensor(index)
    results: list[list[Operand]] = []
    for region in regions:
        e.block(region)
        results.append([e.env[r] for r in region.results])
    outs = results[-1]  # StableHLO: an index out of range takes the last branch
    for number in reversed(range(len(regions) - 1)):
        chosen = e.emit(f"{index.name} == {number}", [index], Type((), "i1"), kind="case")
        outs = [_choose(e, chosen, yes, no) for yes, no in zip(results[number], outs)]
    return outs


def _choose(e: Emitter, test: Tensor, yes: Operand, no: Operand) -> Operand:
    if yes == no:
        return yes
    yes, no = e.tensor(yes), e.tensor(no)
    return e.emit(f"torch.where({test.name}, {yes.name}, {no.name})", [test, yes, no], yes.type, kind="case")
