"""Constants, reshapes, broadcasts, slices, padding: operations that move elements without computing."""

from __future__ import annotations

from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import BIT_UNSIGNED, BITS, HostInt, Literal, Operand, Tensor, literal_code, torch_dtype
from npu_bridge.compiler.ir import Op, Type


@lowering("constant")
def constant(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if "splat" in op.attrs:
        return Literal(op.attrs["splat"], op.result.type)
    return e.emit(e.constant(op.attrs["array"], op.attrs["dims"]), [], op.result.type, kind="constant", constant=True)


@lowering("optimization_barrier", "relabel")
def identity(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    return args


@lowering("iota")
def iota(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    shape, dim, axes = op.result.shape, op.attrs["dim"], op.attrs["axes"]
    n = shape[dim]
    start = f"rt.index({axes}) * {n}" if axes else "0"
    stop = f"{start} + {n}" if axes else f"{n}"
    code = f"torch.arange({start}, {stop}, dtype={torch_dtype(op.result.dtype)}, device=rt.device)"
    line = e.emit(code, [], Type((n,), op.result.dtype), kind="iota")
    if len(shape) == 1:
        return line
    view = tuple(n if d == dim else 1 for d in range(len(shape)))
    return e.emit(f"{line.name}.view({view}).expand({shape})", [line], op.result.type, alias=line, expands=True, kind="iota")


@lowering("broadcast_in_dim")
def broadcast(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    shape = op.result.shape
    if isinstance(args[0], Literal):
        return Literal(args[0].value, op.result.type)
    if isinstance(args[0], HostInt) and shape == ():
        return args[0]
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


@lowering("reshape")
def reshape(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = args[0]
    if isinstance(x, Literal):
        return Literal(x.value, op.result.type)
    if isinstance(x, HostInt) and op.result.shape == ():
        return x
    x = e.tensor(x)
    if x.type.size != op.result.type.size:
        e.problem(op, f"local {x.type} cannot become {op.result.type}: the sharded dimension is split across the new shape")
        return Literal(0, op.result.type)
    if x.type.shape == op.result.shape:
        return x
    return e.emit(f"{x.name}.reshape({op.result.shape})", [x], op.result.type, alias=x, kind="reshape")


@lowering("transpose")
def transpose(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x = args[0]
    if isinstance(x, Literal):
        return Literal(x.value, op.result.type)
    x = e.tensor(x)
    order = tuple(op.attrs["permutation"])
    if order == tuple(range(len(order))):
        return x
    return e.emit(f"{x.name}.permute({order})", [x], op.result.type, alias=x, kind="transpose")


@lowering("slice")
def slice_(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    if isinstance(args[0], Literal):
        return Literal(args[0].value, op.result.type)
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
    if isinstance(fill, Literal) and not any(inner) and min(*low, *high, 0) >= 0:
        pads = tuple(n for d in reversed(range(len(low))) for n in (low[d], high[d]))
        while len(pads) > 2 and pads[-2:] == (0, 0):
            pads = pads[:-2]
        value = literal_code(fill.value, fill.type.dtype)
        return e.emit(f"torch.nn.functional.pad({x.name}, {pads}, value={value})", [x], op.result.type, kind="pad")
    fill = e.tensor(fill)
    return e.emit(f"T.pad({x.name}, {fill.name}, {low}, {high}, {inner})", [x, fill], op.result.type, kind="pad")


def _host_index(e: Emitter, whole: tuple[int, ...], part: tuple[int, ...], starts: list[Operand]) -> str | None:
    """Index code for starts that the host knows; None when one lives on the device."""
    index = []
    for n, size, start in zip(whole, part, starts):
        if size == n:
            index.append(":")
        elif isinstance(start, Tensor):
            return None
        elif isinstance(start, Literal):
            low = min(max(int(start.value), 0), n - size)
            index.append(f"{low}:{low + size}")
        else:
            inside = start.low is not None and start.low >= 0 and start.high is not None and start.high <= n - size
            low = f"({start.code})" if inside else f"min(max({start.code}, 0), {n - size})"  # StableHLO clamps
            if inside and start.code.isidentifier():
                low = start.code
            index.append(f"{low}:{low} + {size}")
    while index and index[-1] == ":":
        index.pop()
    return ", ".join(index) or "..."


def _starts(e: Emitter, starts: list[Operand]) -> tuple[str, list[Tensor]]:
    tensors = [s for s in starts if isinstance(s, Tensor)]
    return ", ".join(index_code(e, s) if isinstance(s, Tensor) else str(int(s.value)) if isinstance(s, Literal) else f"({s.code})" for s in starts), tensors


def index_code(e: Emitter, index: Tensor) -> str:
    """Code of an index by its value: an unsigned one is kept as signed bits."""
    return f"T.unsigned_index({index.name}, {BITS[index.type.dtype]})" if index.type.dtype in BIT_UNSIGNED else index.name


@lowering("dynamic_slice")
def dynamic_slice(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, starts = e.tensor(args[0]), args[1:]
    index = _host_index(e, x.type.shape, op.result.shape, starts)
    if index is not None:
        return e.emit(f"{x.name}[{index}]", [x], op.result.type, alias=x, kind="dynamic_slice")
    code, tensors = _starts(e, starts)
    return e.emit(f"T.dynamic_slice({x.name}, ({code},), {op.result.shape})", [x, *tensors], op.result.type, kind="dynamic_slice")


@lowering("dynamic_update_slice")
def dynamic_update_slice(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, update, starts = e.tensor(args[0]), e.tensor(args[1]), args[2:]
    if update.type.shape == x.type.shape:
        return update
    index = _host_index(e, x.type.shape, update.type.shape, starts)
    if index is not None:
        copy = f"T.write(c := {x.name}.clone(), c[{index}], {update.name})"
        return e.emit(
            copy, [x, update], op.result.type, inplace=[(x, f"T.write({x.name}, {x.name}[{index}], {update.name})")], kind=op.name
        )
    code, tensors = _starts(e, starts)
    form = f"T.dynamic_update_slice({{}}, {update.name}, ({code},))"
    return e.emit(
        form.format(f"{x.name}.clone()"), [x, update, *tensors], op.result.type, inplace=[(x, form.format(x.name))], kind=op.name
    )
