"""8-bit floats are stored and moved as they are and computed with in float32.

torch has next to no operators for them: every operation other than a view gets its operands converted to float32, and
its results converted back, which rounds once per operation as XLA does.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import FLOAT8, Block, Op, Type, Value

_AS_THEY_ARE = frozenset(
    {
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
        "permute",
        "kernel",
    }
)
_HOLD_PROGRAMS = frozenset({"while", "case"})  # their regions are programs, not bodies of a reduction


def widen_float8(block: Block) -> None:
    """Rewrites a block and the regions in it, in place."""
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
    """The bridge's own lowerings of primitives are torch compositions, which need float32; fused operators take what
    they are given.
    """
    return op.name == "kernel" and ".math." in op.attrs["name"]


def _wide(v: Value) -> Value:
    return Value(Type(v.shape, "f32"), v.layout)


def _widen_types(region: Block) -> None:
    """The body of a reduction or scatter computes in float32 throughout."""
    for v in (*region.params, *(r for op in region.ops for r in op.results)):
        if v.dtype in FLOAT8:
            v.type = Type(v.shape, "f32")
    for op in region.ops:
        for inner in op.regions:
            _widen_types(inner)
