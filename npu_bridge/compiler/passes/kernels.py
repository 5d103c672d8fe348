"""One call for each fused operator.

The lowering splits an operator whose results are summed over different factors into parts (Shardy knows no reduction
per result). The parts have the same operands and parameters; here they become one ``kernel`` operation again. Values
that depend on this device's shard (first row of a vocabulary shard, local sizes) are filled in.
"""

from __future__ import annotations

from npu_bridge import jaxcompat
from npu_bridge.compiler.ir import Block, Op, Program, Type, Value, substitute


def merge_kernel_parts(program: Program) -> None:
    _merge(program.body, program)


def _merge(block: Block, program: Program) -> None:
    first: dict[tuple, Op] = {}
    kept: list[Op] = []
    replacement: dict[Value, Value] = {}
    for op in block.ops:
        for region in op.regions:
            _merge(region, program)
        if op.name != "kernel":
            kept.append(op)
            continue
        key = (op.attrs["name"], tuple(id(replacement.get(v, v)) for v in op.operands), repr(op.attrs["params"]))
        part, count = op.attrs["part"], op.attrs["count"]
        if key not in first:
            made = Op(
                "kernel",
                op.operands,
                [Value(Type((), "f32")) for _ in range(count)],
                dict(op.attrs),
                location=op.location,
            )
            made.attrs["filled"] = set()
            first[key] = made
            kept.append(made)
        whole = first[key]
        for i, result in zip(part, op.results):
            if i in whole.attrs["filled"]:
                replacement[result] = whole.results[i]
            else:
                whole.results[i] = result
                result.producer = whole
                whole.attrs["filled"].add(i)
    block.ops = kept
    substitute(block, replacement)
    for op in first.values():
        _fill_missing(op)
        _specialise(op, program)


def _fill_missing(op: Op) -> None:
    """A result that nobody asked for was dropped with its part; it still comes out of the kernel."""
    for r in op.results:
        r.producer = op
    op.attrs.pop("filled")
    op.attrs.pop("part")
    op.attrs.pop("count")


def _specialise(op: Op, program: Program) -> None:
    static = jaxcompat.OPERATORS.get(op.attrs["name"])
    if static is None:
        return

    def value(where):
        return (op.operands if where[0] == "operand" else op.results)[where[1]]

    params = dict(op.attrs["params"])
    for name, where in static["local_sizes"].items():
        params[name] = value(where).shape[where[2]]
    expressions = {}
    for name, where in static["shard_starts"].items():
        v = value(where)
        axes = v.layout[where[2]] if v.layout else ()
        expressions[name] = f"rt.index({axes}) * {v.shape[where[2]]}" if axes else "0"
    op.attrs["params"] = params
    op.attrs["expressions"] = expressions
    op.attrs["inplace"] = {i: o for i, o in static["inplace"].items() if op.results[i].type == op.operands[o].type}
    op.attrs["host_operands"] = static["host_operands"]
