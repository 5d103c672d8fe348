"""Copies between the device's memory and the host's (`npu_bridge.runtime.host_memory`)."""

from __future__ import annotations

import re

from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import Literal, Operand, Tensor, literal_code, torch_dtype
from npu_bridge.compiler.codegen.shaping import _host_index
from npu_bridge.compiler.ir import Op, Value

_OTHER_NAMES = re.compile(r"\b[hv]\d+\b")


@lowering("place")
def place(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    type = op.result.type
    if op.attrs["memory"] == "device":
        return _fetch(e, op, e.tensor(args[0]))
    if isinstance(args[0], Literal):
        value = literal_code(args[0].value, type.dtype)
        out = e.emit(f"rt.memory.full({type.shape}, {value}, {torch_dtype(type.dtype)})", [], type, kind="to_host")
    else:
        x = e.tensor(args[0])
        out = e.emit(f"rt.memory.to_host({x.name})", [x], type, kind="to_host")
        e.items[-1].held = True
    e.items[-1].host = True
    return out


def _slice_behind(value: Value) -> Op | None:
    """The dynamic_slice whose result this is, reshaped or behind remat's barriers."""
    while (made := value.producer) is not None and made.name in ("reshape", "optimization_barrier", "relabel"):
        value = made.operands[made.results.index(value)]
    return made if made is not None and made.name == "dynamic_slice" else None


def _fetch(e: Emitter, op: Op, x: Tensor) -> Operand:
    """Write a copy to the device. Of a slice at a loop's counter the next round's is fetched ahead."""
    part = _slice_behind(op.operands[0])
    loop = e.loops[-1] if e.loops else None
    if part is not None and loop is not None and isinstance(stack := e.env.get(part.operands[0]), Tensor):
        index = _host_index(e, stack.type.shape, part.result.shape, [e.env[v] for v in part.operands[1:]])
        counter = re.compile(rf"\b{loop.counter}\b")
        if (
            index is not None
            and counter.search(index)
            and not _OTHER_NAMES.search(index)
            and stack.name not in loop.carried
        ):
            following = counter.sub(f"({loop.counter} + {loop.step})", index)
            ahead = f"{stack.name}[{following}] if {loop.counter} != {loop.last} else None"
            out = e.emit(
                f"rt.memory.to_device({stack.name}[{index}], {ahead})", [stack], part.result.type, kind="to_device"
            )
            e.items[-1].ahead_bytes = part.result.type.bytes
            if part.result.shape == op.result.shape:
                return out
            return e.emit(f"{out.name}.reshape({op.result.shape})", [out], op.result.type, alias=out, kind="reshape")
    return e.emit(f"rt.memory.to_device({x.name})", [x], op.result.type, kind="to_device")


@lowering("host_update")
def host_update(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, update = e.tensor(args[0]), e.tensor(args[1])
    if update.type.shape == x.type.shape:
        out = e.emit(f"rt.memory.to_host({update.name})", [update], op.result.type, kind="to_host")
    else:
        index = _host_index(e, x.type.shape, update.type.shape, args[2:])
        if index is None:
            e.problem(
                op,
                "an array in host memory is updated at an index that only the device knows; update it at a loop's "
                "counter, or on the device",
            )
            return Literal(0, op.result.type)
        out = e.emit(
            f"rt.memory.write(c := rt.memory.clone({x.name}), c[{index}], {update.name})",
            [x, update],
            op.result.type,
            inplace=[(x, f"rt.memory.write({x.name}, {x.name}[{index}], {update.name})")],
            kind="to_host",
        )
    e.items[-1].host = True
    e.items[-1].held = True
    return out
