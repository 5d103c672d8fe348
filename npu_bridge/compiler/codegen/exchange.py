"""Collectives and fused kernels."""

from __future__ import annotations

from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import HostInt, Literal, Operand
from npu_bridge.compiler.ir import Op


@lowering("all_reduce")
def all_reduce(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, axes, kind = e.tensor(args[0]), tuple(op.attrs["axes"]), op.attrs["kind"]
    n = e.mesh.size(axes)
    if n == 1:
        return x
    e.note_collective(op, "all_reduce", [axes], x.type, 2 * x.type.bytes * (n - 1) // n)
    form = f"rt.all_reduce({{}}, {axes}, {kind!r})"
    return e.emit(
        form.format(f"{x.name}.clone()"), [x], op.result.type, inplace=[(x, form.format(x.name))], kind="collective"
    )


def _dims(op: Op) -> list[tuple[str, ...]]:
    return [tuple(a) for a in op.attrs["dims"]]


@lowering("all_gather")
def all_gather(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, dims = e.tensor(args[0]), _dims(op)
    if all(e.mesh.size(axes) == 1 for axes in dims):
        return x
    e.note_collective(op, "all_gather", dims, op.result.type, op.result.type.bytes - x.type.bytes)
    return e.emit(f"rt.all_gather({x.name}, {dims})", [x], op.result.type, kind="collective")


@lowering("all_slice")
def all_slice(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, dims = e.tensor(args[0]), _dims(op)
    index = []
    for n, axes in zip(op.result.shape, dims):
        start = f"rt.index({axes}) * {n}"
        index.append(f"{start}:{start} + {n}" if axes else ":")
    while index and index[-1] == ":":
        index.pop()
    return e.emit(f"{x.name}[{', '.join(index) or '...'}]", [x], op.result.type, alias=x, kind="all_slice")


@lowering("reduce_scatter")
def reduce_scatter(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, dims = e.tensor(args[0]), _dims(op)
    if all(e.mesh.size(axes) == 1 for axes in dims):
        return x
    e.note_collective(op, "reduce_scatter", dims, x.type, x.type.bytes - op.result.type.bytes)
    return e.emit(f"rt.reduce_scatter({x.name}, {dims}, {op.attrs['kind']!r})", [x], op.result.type, kind="collective")


@lowering("start_all_gather")
def start_all_gather(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, dims = e.tensor(args[0]), _dims(op)
    e.note_collective(op, "all_gather", dims, op.result.type, op.result.type.bytes - x.type.bytes, waits=False)
    return e.emit(f"rt.start_all_gather({x.name}, {dims})", [x], op.result.type, kind="collective")


@lowering("start_reduce_scatter")
def start_reduce_scatter(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, dims = e.tensor(args[0]), _dims(op)
    n = e.mesh.size(tuple(op.attrs["axes"]))
    e.note_collective(op, "reduce_scatter", dims, x.type, x.type.bytes * (n - 1) // n, waits=False)
    return e.emit(
        f"rt.start_reduce_scatter({x.name}, {dims}, {op.attrs['kind']!r})", [x], op.result.type, kind="collective"
    )


@lowering("wait")
def wait(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Wait for a collective in flight and return its result.

    Its operand is in use until here. Shards gathered along the first dimension are a view of the receive buffer, others
    are copied. A permute's result is its receive buffer.
    """
    under_way, x = (e.tensor(a) for a in args)
    view = op.attrs["of"] == "all_gather" and bool(op.attrs["dims"][0])
    view = view or op.attrs["of"] == "permute"
    return e.emit(
        f"{under_way.name}.wait()", [under_way, x], op.result.type, alias=under_way if view else None, kind="collective"
    )


@lowering("all_to_all")
def all_to_all(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, axes = e.tensor(args[0]), tuple(op.attrs["axes"])
    n = e.mesh.size(axes)
    e.note_collective(op, "all_to_all", [axes], x.type, x.type.bytes * (n - 1) // n)
    code = f"rt.all_to_all({x.name}, {axes}, {op.attrs['source']}, {op.attrs['target']})"
    return e.emit(code, [x], op.result.type, kind="collective")


@lowering("start_all_to_all")
def start_all_to_all(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, axes = e.tensor(args[0]), tuple(op.attrs["axes"])
    n = e.mesh.size(axes)
    e.note_collective(op, "all_to_all", [axes], x.type, x.type.bytes * (n - 1) // n, waits=False)
    code = f"rt.start_all_to_all({x.name}, {axes}, {op.attrs['source']}, {op.attrs['target']})"
    return e.emit(code, [x], op.result.type, kind="collective")


@lowering("ragged_all_to_all")
def ragged_all_to_all(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Every device gets all operands and picks its runs; where the host may read the device, only these are sent."""
    tensors, axes = [e.tensor(a) for a in args], tuple(op.attrs["axes"])
    x, output, *runs = tensors
    n = e.mesh.size(axes)
    sent = x.type.bytes * (n - 1) if not e.allow_host_sync else x.type.bytes * (n - 1) // n  # at most, if balanced
    e.note_collective(op, "ragged_all_to_all", [axes], x.type, sent)
    names = ", ".join(t.name for t in runs)
    form = f"rt.ragged_all_to_all({x.name}, {{}}, ({names}), {axes}, exact={e.allow_host_sync})"
    return e.emit(
        form.format(f"{output.name}.clone()"),
        tensors,
        op.result.type,
        inplace=[(output, form.format(output.name))],
        kind="collective",
    )


@lowering("permute")
def permute(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    pairs = [tuple(p) for p in op.attrs["pairs"]]
    if all(s == t for s, t in pairs) and len(pairs) == e.mesh.count:
        return x
    e.note_collective(op, "permute", [tuple(e.mesh.sizes)], x.type, x.type.bytes, pairs=pairs)
    return e.emit(f"rt.permute({x.name}, {pairs})", [x], op.result.type, kind="collective")


@lowering("start_permute")
def start_permute(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    pairs = [tuple(p) for p in op.attrs["pairs"]]
    e.note_collective(op, "permute", [tuple(e.mesh.sizes)], x.type, x.type.bytes, waits=False, pairs=pairs)
    return e.emit(f"rt.start_permute({x.name}, {pairs})", [x], op.result.type, kind="collective")


@lowering("partition_id")
def partition_id(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    return HostInt("rt.place", op.result.type, 0, e.mesh.count - 1)


@lowering("callback")
def callback(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    """Call a host Python function by its number (`npu_bridge.compiler.callbacks`)."""
    xs = [e.tensor(a) for a in args]
    code = f"rt.callback({op.attrs['number']}, [{', '.join(x.name for x in xs)}])"
    if op.attrs["silent"]:
        e.emit_many(code, xs, [], kind="effect")
        return [Literal(0, r.type) for r in op.results]
    tail = "[0]" if len(op.results) == 1 else ""
    return list(
        e.emit_many(f"{code}{tail}", xs, [r.type for r in op.results], kind="effect" if op.attrs["effect"] else "")
    )


@lowering("kernel")
def kernel(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    """One fused operator.

    `math.*` are torch compositions of the bridge itself, the rest comes from the kernel table.
    """
    name = op.attrs["name"].removeprefix("npu_bridge.")
    xs = [e.tensor(a) for a in args]
    params = dict(op.attrs["params"])
    words = [f"{k}={v!r}" for k, v in params.items() if k not in op.attrs.get("expressions", {})]
    words += [f"{k}={v}" for k, v in op.attrs.get("expressions", {}).items()]
    identifier = name.replace(".", "_")
    types = [r.type for r in op.results]
    tail = "[0]" if len(types) == 1 else ""
    names = [x.name for x in xs]
    for i in op.attrs.get("host_operands", ()):
        if xs[i].name in e.arguments:
            names[i] = e.host_argument(xs[i].name)
    xs = [x for x, n in zip(xs, names) if x.name == n]
    if name.startswith("math."):
        return list(e.emit_many(f"T.{identifier}({', '.join([*names, *words])}){tail}", xs, types, kind="kernel"))
    e.kernels.append(
        {
            "name": op.attrs["name"],
            "operands": [str(v.type) for v in op.operands],
            "results": [str(t) for t in types],
            "params": params,
            "times": e._trips,
            "location": str(op.location),
        }
    )
    overwritten = op.attrs.get("inplace", {})
    call = f"rt.kernel.{identifier}({', '.join([*names, *words])}"
    if not overwritten:
        return list(e.emit_many(f"{call}){tail}", xs, types, kind="kernel"))
    taken = tuple(names[overwritten[i]] if i in overwritten else "" for i in range(len(types)))
    return list(
        e.emit_many(
            f"{call}, inplace=False){tail}", xs, types, inplace=(taken, f"{call}, inplace=True){tail}"), kind="kernel"
        )
    )
