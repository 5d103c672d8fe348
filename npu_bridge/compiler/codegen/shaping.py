"""Constants, reshapes, broadcasts, slices, padding: operations that move elements without computing."""

from __future__ import annotations

import dataclasses
import math

from npu_bridge.compiler.codegen.branches import bounds_of, host_code
from npu_bridge.compiler.codegen.emitter import LARGEST_TABLE, Emitter, lowering
from npu_bridge.compiler.codegen.operands import (
    BIT_UNSIGNED,
    BITS,
    HostInt,
    HostTable,
    Literal,
    Operand,
    Tensor,
    literal_code,
    torch_dtype,
)
from npu_bridge.compiler.codegen.program import Assign
from npu_bridge.compiler.ir import COMPLEX, FLOATS, Op, Type


@lowering("constant")
def constant(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if "splat" in op.attrs:
        return Literal(op.attrs["splat"], op.result.type)
    array, dims = op.attrs["array"], op.attrs["dims"]
    if op.result.dtype in (*BITS, "i1") and 0 < op.result.type.size == array.size <= LARGEST_TABLE and not any(dims):
        return e.host_table(array, op.result.dtype)
    return e.emit(e.constant(array, dims), [], op.result.type, kind="constant", constant=True)


def table_part(
    e: Emitter, table: HostTable, shape: tuple[int, ...], strides: tuple[int, ...], steps: list[str] | None = None
) -> Operand:
    """Return part of a host table; without dimensions it is a host number. steps: codes added to the offset."""
    if steps is None:
        steps = []
    offset = " + ".join([*([table.offset] if table.offset != "0" or not steps else []), *steps])
    if shape == ():
        return e.host(HostInt(f"{table.name}[{offset}]", Type((), table.type.dtype), table.low, table.high))
    return dataclasses.replace(table, type=Type(shape, table.type.dtype), strides=strides, offset=offset)


@lowering("optimization_barrier", "relabel")
def identity(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    return args


@lowering("iota")
def iota(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    shape, dim, axes = op.result.shape, op.attrs["dim"], op.attrs["axes"]
    n = shape[dim]
    start = f"rt.index({axes}) * {n}" if axes else "0"
    stop = f"{start} + {n}" if axes else f"{n}"
    dtype, final = torch_dtype(op.result.dtype), ""
    if op.result.dtype in COMPLEX or dtype.startswith("torch.float8"):  # which torch.arange does not make
        final, dtype = f".to({dtype})", "torch.float64" if op.result.dtype == "complex<f64>" else "torch.float32"
    code = f"torch.arange({start}, {stop}, dtype={dtype}, device=rt.device){final}"
    line = e.emit(code, [], Type((n,), op.result.dtype), kind="iota")
    if len(shape) == 1:
        return line
    view = tuple(n if d == dim else 1 for d in range(len(shape)))
    return e.emit(
        f"{line.name}.view({view}).expand({shape})", [line], op.result.type, alias=line, expands=True, kind="iota"
    )


@lowering("broadcast_in_dim")
def broadcast(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    shape = op.result.shape
    if isinstance(args[0], Literal):
        return Literal(args[0].value, op.result.type)
    if isinstance(args[0], HostInt):
        return dataclasses.replace(args[0], type=op.result.type)
    if isinstance(args[0], HostTable):
        strides = [0] * len(shape)
        for i, d in enumerate(op.attrs["broadcast_dimensions"]):
            strides[d] = args[0].strides[i] if args[0].type.shape[i] > 1 else 0
        return table_part(e, args[0], shape, tuple(strides))
    x = e.tensor(args[0])
    view = [1] * len(shape)
    for i, d in enumerate(op.attrs["broadcast_dimensions"]):
        view[d] = x.type.shape[i]
    if any(v not in (1, n) for v, n in zip(view, shape)):
        e.problem(op, f"{x.type} cannot be broadcast to {op.result.type}")
        return Literal(0, op.result.type)
    code = x.name
    in_order = list(op.attrs["broadcast_dimensions"]) == sorted(op.attrs["broadcast_dimensions"])
    if not in_order:
        order = sorted(range(len(x.type.shape)), key=lambda i: op.attrs["broadcast_dimensions"][i])
        code += f".permute({tuple(order)})"
    if tuple(view) != x.type.shape or not in_order:
        code += f".reshape({tuple(view)})"
    if tuple(view) != shape:
        code += f".expand({shape})"
    if code == x.name:
        return x
    return e.emit(code, [x], op.result.type, alias=x, expands=tuple(view) != shape, kind="broadcast_in_dim")


def _strides_of(table: HostTable, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides of a table after a reshape that only adds or removes unit dimensions, else None."""
    long = [(n, s) for n, s in zip(table.type.shape, table.strides) if n != 1]
    if [n for n, _ in long] != [n for n in shape if n != 1]:
        return None
    rest = iter(long)
    return tuple(next(rest)[1] if n != 1 else 0 for n in shape)


@lowering("reshape")
def reshape(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = args[0]
    if isinstance(x, Literal):
        return Literal(x.value, op.result.type)
    if isinstance(x, HostInt) and x.type.size == op.result.type.size:
        return dataclasses.replace(x, type=op.result.type)
    if isinstance(x, HostTable) and (strides := _strides_of(x, op.result.shape)) is not None:
        return table_part(e, x, op.result.shape, strides)
    x = e.tensor(x)
    if x.type.size != op.result.type.size:
        e.problem(
            op, f"local {x.type} cannot become {op.result.type}: the sharded dimension is split across the new shape"
        )
        return Literal(0, op.result.type)
    if x.type.shape == op.result.shape:
        return x
    code = (
        f"rt.memory.reshape({x.name}, {op.result.shape})" if op.result.host else f"{x.name}.reshape({op.result.shape})"
    )
    return e.emit(code, [x], op.result.type, alias=x, kind="reshape")


@lowering("transpose")
def transpose(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = args[0]
    if isinstance(x, Literal):
        return Literal(x.value, op.result.type)
    order = tuple(op.attrs["permutation"])
    if isinstance(x, HostTable):
        return table_part(e, x, op.result.shape, tuple(x.strides[d] for d in order))
    x = e.tensor(x)
    if order == tuple(range(len(order))):
        return x
    return e.emit(f"{x.name}.permute({order})", [x], op.result.type, alias=x, kind="transpose")


@lowering("slice")
def slice_(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if isinstance(args[0], Literal):
        return Literal(args[0].value, op.result.type)
    if isinstance(args[0], HostTable):
        x, begins, steps = args[0], op.attrs["start_indices"], op.attrs["strides"]
        moved = sum(b * s for b, s in zip(begins, x.strides))
        return table_part(
            e, x, op.result.shape, tuple(a * s for a, s in zip(steps, x.strides)), [str(moved)] if moved else []
        )
    x = e.tensor(args[0])
    index = []
    for n, low, high, step in zip(x.type.shape, *(op.attrs[k] for k in ("start_indices", "limit_indices", "strides"))):
        index.append(":" if (low, high, step) == (0, n, 1) else f"{low}:{high}" + (f":{step}" if step > 1 else ""))
    if all(i == ":" for i in index):
        return x
    while index[-1] == ":":
        index.pop()
    return e.emit(f"{x.name}[{', '.join(index)}]", [x], op.result.type, alias=x, kind="slice")


@lowering("concatenate")
def concatenate(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if len(args) == 1:
        return args[0]
    parts = [e.tensor(a) for a in args]
    names = ", ".join(p.name for p in parts)
    return e.emit(f"torch.cat(({names}), {op.attrs['dimension']})", parts, op.result.type, kind="concatenate")


@lowering("reverse")
def reverse(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = e.tensor(args[0])
    return e.emit(f"{x.name}.flip({tuple(op.attrs['dimensions'])})", [x], op.result.type, kind="reverse")


@lowering("pad")
def pad(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, fill = e.tensor(args[0]), args[1]
    low, high, inner = (op.attrs[k] for k in ("edge_padding_low", "edge_padding_high", "interior_padding"))
    if isinstance(fill, Literal) and fill.type.dtype not in COMPLEX and not any(inner) and min(*low, *high, 0) >= 0:
        pads = tuple(n for d in reversed(range(len(low))) for n in (low[d], high[d]))
        while len(pads) > 2 and pads[-2:] == (0, 0):
            pads = pads[:-2]
        value = literal_code(fill.value, fill.type.dtype)
        return e.emit(f"torch.nn.functional.pad({x.name}, {pads}, value={value})", [x], op.result.type, kind="pad")
    fill = e.tensor(fill)
    return e.emit(f"T.pad({x.name}, {fill.name}, {low}, {high}, {inner})", [x, fill], op.result.type, kind="pad")


def _clamped(start: Literal | HostInt, most: int) -> str:
    """Return code of a host-known start, clamped to 0 .. most as in StableHLO."""
    if isinstance(start, Literal):
        return str(min(max(int(start.value), 0), most))
    if start.low is not None and start.low >= 0 and start.high is not None and start.high <= most:
        return start.code if start.code.isidentifier() else f"({start.code})"
    return f"min(max({start.code}, 0), {most})"


def _host_index(e: Emitter, whole: tuple[int, ...], part: tuple[int, ...], starts: list[Operand]) -> str | None:
    """Return index code for host-known starts; None if one is on the device."""
    index = []
    for n, size, start in zip(whole, part, starts):
        if size == n:
            index.append(":")
        elif isinstance(start, Tensor):
            return None
        elif isinstance(start, Literal):
            low = int(_clamped(start, n - size))
            index.append(f"{low}:{low + size}")
        else:
            low = _clamped(start, n - size)
            index.append(f"{low}:{low} + {size}")
    while index and index[-1] == ":":
        index.pop()
    return ", ".join(index) or "..."


def _starts(e: Emitter, starts: list[Operand]) -> tuple[str, list[Tensor]]:
    tensors = [s for s in starts if isinstance(s, Tensor)]
    return ", ".join(
        index_code(e, s) if isinstance(s, Tensor) else str(int(s.value)) if isinstance(s, Literal) else f"({s.code})"
        for s in starts
    ), tensors


def index_code(e: Emitter, index: Tensor) -> str:
    """Return code of an index by value; unsigned ones are stored as signed bits."""
    return (
        f"T.unsigned_index({index.name}, {BITS[index.type.dtype]})" if index.type.dtype in BIT_UNSIGNED else index.name
    )


@lowering("dynamic_slice")
def dynamic_slice(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if isinstance(args[0], HostTable) and not any(
        isinstance(s, Tensor) for s, n, m in zip(args[1:], args[0].type.shape, op.result.shape) if n != m
    ):
        x, steps = args[0], []
        for start, n, size, stride in zip(args[1:], x.type.shape, op.result.shape, x.strides):
            if n != size and stride:
                steps.append(f"{_clamped(start, n - size)}" + (f" * {stride}" if stride > 1 else ""))
        return table_part(e, x, op.result.shape, x.strides, [s for s in steps if s != "0"])
    x, starts = e.tensor(args[0]), args[1:]
    index = _host_index(e, x.type.shape, op.result.shape, starts)
    if index is None and op.result.host:
        e.problem(op, "an array in host memory is read at an index that only the device knows; move it there whole")
        return Literal(0, op.result.type)
    if index is not None:
        return e.emit(f"{x.name}[{index}]", [x], op.result.type, alias=x, kind="dynamic_slice")
    code, tensors = _starts(e, starts)
    return e.emit(
        f"T.dynamic_slice({x.name}, ({code},), {op.result.shape})", [x, *tensors], op.result.type, kind="dynamic_slice"
    )


def _updated_table(e: Emitter, op: Op, args: list[Operand]) -> Operand | None:
    """Replace one element of a host table if the host knows all operands: branch numbers stacked by a scan."""
    x, update, starts = args[0], args[1], args[2:]
    if isinstance(x, (Tensor, HostInt)) or not isinstance(update, (HostInt, Literal)) or update.type.size != 1:
        return None
    if (
        op.result.dtype in FLOATS
        or not 1 < x.type.size <= LARGEST_TABLE
        or any(isinstance(s, Tensor) for s, n in zip(starts, x.type.shape) if n > 1)
    ):
        return None
    values = f"{(int(x.value),)} * {x.type.size}" if isinstance(x, Literal) else x.name
    if isinstance(x, HostTable) and (x.offset != "0" or x.type.shape != x.whole):
        return None
    strides = [math.prod(x.type.shape[d + 1 :]) for d in range(len(x.type.shape))]
    at = " + ".join(
        f"{_clamped(start, n - 1)} * {stride}" for start, n, stride in zip(starts, x.type.shape, strides) if n > 1
    )
    name = e.fresh("h")
    e.items.append(Assign([name], [f"rt.replaced({values}, {at}, {host_code(update)})"]))
    return e.host_variable(name, op.result.type, *bounds_of([x, update]))


@lowering("dynamic_update_slice")
def dynamic_update_slice(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if (table := _updated_table(e, op, args)) is not None:
        return table
    x, update, starts = e.tensor(args[0]), e.tensor(args[1]), args[2:]
    if update.type.shape == x.type.shape:
        return update
    index = _host_index(e, x.type.shape, update.type.shape, starts)
    if index is not None:
        copy = f"T.write(c := {x.name}.clone(), c[{index}], {update.name})"
        return e.emit(
            copy,
            [x, update],
            op.result.type,
            inplace=[(x, f"T.write({x.name}, {x.name}[{index}], {update.name})")],
            kind=op.name,
        )
    code, tensors = _starts(e, starts)
    form = f"T.dynamic_update_slice({{}}, {update.name}, ({code},))"
    return e.emit(
        form.format(f"{x.name}.clone()"),
        [x, update, *tensors],
        op.result.type,
        inplace=[(x, form.format(x.name))],
        kind=op.name,
    )
