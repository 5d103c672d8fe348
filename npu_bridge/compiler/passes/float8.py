"""Compute with 8-bit floats in float32; store and move them as they are.

torch has hardly any operators for them. Every operation other than a view converts operands to float32 and results
back, rounding once per operation as XLA does.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import FLOAT8, Block, Op, Type, Value

_AS_THEY_ARE = frozenset(
    {
        "place",
        "host_update",
        "reshape",
        "transpose",
        "slice",
        "broadcast_in_dim",
        "constant",
        "convert",
        "bitcast_convert",
        "optimization_barrier",
        "relabel",
        "all_gather",
        "all_slice",
        "all_to_all",
        "ragged_all_to_all",
        "permute",
        "kernel",
    }
)
_HOLD_PROGRAMS = frozenset({"while", "case"})  # their regions are programs, not reduction bodies


def widen_float8(block: Block) -> None:
    """Rewrite a block and its regions in place."""
    kept: list[Op] = []
    for op in block.ops:
        if op.name in _HOLD_PROGRAMS:
            for region in op.regions:
                widen_float8(region)
        narrow = any(v.dtype in FLOAT8 for v in (*op.operands, *op.results))
        if not narrow or (op.name in _AS_THEY_ARE | _HOLD_PROGRAMS and not _is_composition(op)):
            kept.append(op)
            continue
        operands = []
        for v in op.operands:
            if v.dtype in FLOAT8:
                kept.append(Op("convert", [v], [_wide(v)], location=op.location))
                v = kept[-1].result
            operands.append(v)
        results = [_wide(r) if r.dtype in FLOAT8 else r for r in op.results]
        for region in op.regions:
            _widen_types(region)
        kept.append(Op(op.name, operands, results, op.attrs, op.regions, op.location))
        for wide, result in zip(results, op.results):
            if wide is not result:
                kept.append(Op("convert", [wide], [result], location=op.location))
    block.ops = kept


def _is_composition(op: Op) -> bool:
    """Whether a kernel is one of the bridge's torch compositions, which need float32; fused operators accept 8-bit
    floats.
    """
    return op.name == "kernel" and ".math." in op.attrs["name"]


def _wide(v: Value) -> Value:
    return Value(Type(v.shape, "f32"), v.layout)


def _widen_types(region: Block) -> None:
    """Widen the body of a reduction or scatter to float32."""
    for v in (*region.params, *(r for op in region.ops for r in op.results)):
        if v.dtype in FLOAT8:
            v.type = Type(v.shape, "f32")
    for op in region.ops:
        for inner in op.regions:
            _widen_types(inner)
