"""Simplify slices, concatenations, pads and reshapes that undo each other: what an unrolled scan leaves behind.

* a slice inside one piece of a concatenation is a slice of that piece (residuals of the layers, stacked and unstacked);
* a slice of a slice is one slice; empty pieces of a concatenation go;
* a reshape of a reshape is one reshape, or none (a residual on its way into the stack and out of it);
* a sum of zero-padded pieces that lie side by side is their concatenation (gradients of stacked parameters).

Views cost next to nothing on torch, but a concatenation copies what was there already, and each padded piece is as
large as the whole.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Value, substitute
from npu_bridge.compiler.passes.simplify import uses


def simplify_slices(block: Block) -> None:
    """Rewrite a block and its regions in place."""
    for op in block.ops:
        for region in op.regions:
            simplify_slices(region)
    _join_padded(block)
    _forward_slices(block)


# ---- slices
# -----------------------------------------------------------------------------------------------------------------


def _forward_slices(block: Block) -> None:
    """Operations come after what they read, so one walk in order sees every source in its final form."""
    replacement: dict[Value, Value] = {}
    for op in block.ops:
        op.operands = [replacement.get(v, v) for v in op.operands]
        if op.name == "slice" and all(step == 1 for step in op.attrs["strides"]):
            _look_through(op)
        elif op.name == "concatenate":
            op.operands = [v for v in op.operands if v.shape[op.attrs["dimension"]]] or op.operands[:1]
        elif _keeps_order(op):
            if _keeps_order(op.operands[0].producer):
                op.name, op.operands, op.attrs = "reshape", list(op.operands[0].producer.operands), {}
        else:
            continue
        if (
            len(op.operands) == 1
            and op.result.type == op.operands[0].type
            and op.result.layout == op.operands[0].layout
        ):
            replacement[op.result] = op.operands[0]
    substitute(block, replacement)


def _keeps_order(op: Op | None) -> bool:
    """Whether an operation gives its operand another shape and nothing else."""
    if op is None or op.name not in ("reshape", "broadcast_in_dim") or op.result.type.size != op.operands[0].type.size:
        return False
    return op.name == "reshape" or list(op.attrs["broadcast_dimensions"]) == sorted(op.attrs["broadcast_dimensions"])


def _look_through(op: Op) -> None:
    """Move a slice with steps of one to the array that its elements come from."""
    while True:
        source, begins, ends = op.operands[0].producer, op.attrs["start_indices"], op.attrs["limit_indices"]
        if source is not None and source.name == "slice" and all(step == 1 for step in source.attrs["strides"]):
            part, shift = source.operands[0], list(source.attrs["start_indices"])
        elif source is not None and source.name == "concatenate":
            found = _piece(source, begins[source.attrs["dimension"]], ends[source.attrs["dimension"]])
            if found is None:
                return
            part, offset = found
            shift = [-offset if d == source.attrs["dimension"] else 0 for d in range(len(begins))]
        else:
            return
        if part.layout != op.operands[0].layout:
            return
        op.operands = [part]
        # A new dict: equal slices may share theirs.
        op.attrs = op.attrs | {
            "start_indices": [b + s for b, s in zip(begins, shift)],
            "limit_indices": [e + s for e, s in zip(ends, shift)],
        }


def _piece(concatenate: Op, begin: int, end: int) -> tuple[Value, int] | None:
    """The operand that holds places begin .. end, and where it starts; None when they lie in several."""
    offset = 0
    for part in concatenate.operands:
        size = part.shape[concatenate.attrs["dimension"]]
        if offset <= begin and end <= offset + size:
            return part, offset
        offset += size
    return None


# ---- sums of padded pieces
# ----------------------------------------------------------------------------------------------------


def _is_zero(value: Value) -> bool:
    made = value.producer
    return made is not None and made.name == "constant" and made.attrs.get("splat", None) == 0


def _padded_dim(value: Value) -> int | None:
    """The one dimension along which a value is zero-padded; None for anything else."""
    op = value.producer
    if op is None or op.name != "pad" or not _is_zero(op.operands[1]) or any(op.attrs["interior_padding"]):
        return None
    low, high = op.attrs["edge_padding_low"], op.attrs["edge_padding_high"]
    dims = [d for d, (a, b) in enumerate(zip(low, high)) if a or b]
    return dims[0] if len(dims) == 1 and min(low[dims[0]], high[dims[0]]) >= 0 else None


def _leaves(op: Op, count: dict[Value, int], inside: set[int]) -> list[Value]:
    """The terms of a sum whose inner sums nobody else reads."""
    found: list[Value] = []
    for v in op.operands:
        made = v.producer
        if made is not None and made.name == "add" and count.get(v) == 1 and id(made) in inside:
            found += _leaves(made, count, inside)
        else:
            found.append(v)
    return found


def _join_padded(block: Block) -> None:
    count, inside = uses(block), {id(op) for op in block.ops}
    filled: dict[Value, tuple[int, int]] = {}
    kept: list[Op] = []
    for op in block.ops:
        joined = None
        if op.name == "add" and (found := _filled(op, count, inside, filled)) is not None:
            filled[op.result] = found
            if found[1] == op.result.shape[found[0]]:
                joined = _concatenation(op, count, inside)
        kept.append(joined or op)
    block.ops = kept


def _filled(op: Op, count: dict[Value, int], inside: set[int], filled: dict[Value, tuple[int, int]]):
    """Dimension and total size of the pieces that a sum of padded pieces adds up; None for any other sum.

    Kept for each partial sum (`filled`): the leaves of a long sum are gathered once, not again for each part of it.
    """
    parts = []
    for v in op.operands:
        if (dim := _padded_dim(v)) is not None:
            parts.append((dim, v.producer.operands[0].shape[dim]))
        elif v in filled and count.get(v) == 1 and id(v.producer) in inside:
            parts.append(filled[v])
        else:
            return None
    (dim, size), (other, more) = parts
    return (dim, size + more) if dim == other else None


def _concatenation(op: Op, count: dict[Value, int], inside: set[int]) -> Op | None:
    terms = _leaves(op, count, inside)
    dims = {_padded_dim(t) for t in terms}
    if len(dims) != 1 or None in dims:
        return None
    (dim,) = dims
    terms.sort(key=lambda t: t.producer.attrs["edge_padding_low"][dim])
    end = 0
    for t in terms:
        if t.producer.attrs["edge_padding_low"][dim] != end or t.layout != op.result.layout:
            return None
        end += t.producer.operands[0].shape[dim]
    if end != op.result.shape[dim]:
        return None
    return Op(
        "concatenate", [t.producer.operands[0] for t in terms], [op.result], {"dimension": dim}, location=op.location
    )
