"""One mask for all layers and both directions, where attention adds a mask to its logits (on a CPU).

The mask follows from segment ids alone, so calls that read the same ids share it. It then stays in memory from the
first layer to the last gradient; one that is much larger than the queries is left to be made, and dropped, in every
call.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Type, Value
from npu_bridge.compiler.passes.simplify import behind_barriers
from npu_bridge.jaxcompat import CALL_PREFIX

MOST = 4  # times the bytes of the queries

_FORMS = {
    CALL_PREFIX + "attention" + form + direction: start
    for form in ("_segments", "_packed", "_ring")
    for direction, start in (("", 0), ("_backward", 1))
}
_DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def share_masks(block: Block) -> None:
    """Rewrite a block and its regions in place; equal masks are joined by `share_equal_operations`."""
    kept: list[Op] = []
    for op in block.ops:
        for region in op.regions:
            share_masks(region)
        if op.name == "kernel" and op.attrs["name"] in _FORMS:
            mask = _mask(op)
            if mask is not None:
                kept.append(mask)
                op.operands = [*op.operands, mask.result]
                op.attrs["params"] = op.attrs["params"] | {"masked": True}
        kept.append(op)
    block.ops = kept


def _mask(op: Op) -> Op | None:
    start = _FORMS[op.attrs["name"]]
    q, k = op.operands[start : start + 2]
    ids_q, ids_kv = (behind_barriers(v) for v in (op.operands[6:8] if start else op.operands[3:5]))
    params = {name: op.attrs["params"][name] for name in ("causal", "window", "blocks")}
    size, left, right = params["blocks"]
    (rows, positions), keys = ids_q.shape, k.shape[1]
    shape = (rows * -(-positions // size), 1, size, left + size + right) if size else (rows, 1, positions, keys)
    made = Type(shape, q.dtype)
    if q.dtype not in _DTYPES or made.bytes > MOST * q.type.bytes:
        return None
    layout = (ids_q.layout[0], (), (), ()) if ids_q.layout else ()
    attrs = {"name": CALL_PREFIX + "math.attention_mask", "params": params | {"dtype": _DTYPES[q.dtype]}}
    return Op("kernel", [ids_q, ids_kv], [Value(made, layout)], attrs, location=op.location)
