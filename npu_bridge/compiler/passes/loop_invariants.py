"""Loop-invariant code motion.

Move an operation out of a loop when its operands do not change there and its results are no larger than they are: a
result stays in memory while the loop runs, and most that is larger (broadcasts) is a view that costs nothing.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Value

# Regions, effects, exchanges between devices (which keep their order on all of them), and barriers, which are there to
# stay.
_STAYS = frozenset(
    {
        "while",
        "case",
        "rng",
        "rng_bit_generator",
        "optimization_barrier",
        "all_reduce",
        "all_gather",
        "all_slice",
        "reduce_scatter",
        "start_all_gather",
        "start_reduce_scatter",
        "wait",
        "all_to_all",
        "ragged_all_to_all",
        "permute",
        "partition_id",
        "callback",
        "place",
        "host_update",
    }
)


def move_loop_invariants(block: Block) -> None:
    """Rewrite a block and its regions in place; from the innermost loop outwards."""
    kept: list[Op] = []
    for op in block.ops:
        for region in op.regions:
            move_loop_invariants(region)
        if op.name == "while":
            kept += _taken_out(op)
        kept.append(op)
    block.ops = kept


def _is_number(op: Op) -> bool:
    """One number for a whole array, which is never stored."""
    if op.name == "broadcast_in_dim":
        return op.operands[0].producer is not None and _is_number(op.operands[0].producer)
    return op.name == "constant" and "splat" in op.attrs


def _taken_out(loop: Op) -> list[Op]:
    body = loop.regions[1]
    changing = {r for op in body.ops for r in op.results}
    outside: dict[Value, Value] = {}
    for param, result, operand in zip(body.params, body.results, loop.operands):
        if result is param:
            outside[param] = operand
        else:
            changing.add(param)
    moved, kept = [], []
    for op in body.ops:
        small = sum(r.type.bytes for r in op.results) <= sum(v.type.bytes for v in op.operands)
        if op.name in _STAYS or op.regions or changing.intersection(op.operands) or not (small or _is_number(op)):
            kept.append(op)
            continue
        op.operands = [outside.get(v, v) for v in op.operands]
        changing.difference_update(op.results)
        moved.append(op)
    body.ops = kept
    return moved
