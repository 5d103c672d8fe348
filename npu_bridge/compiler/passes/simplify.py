"""Common subexpression elimination and dead code elimination, per region."""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Value, free_values, has_effect, substitute

_EFFECTS = frozenset({"rng"})


def _key(op: Op) -> tuple | None:
    """Key of common subexpressions, attributes aside."""
    if op.regions or op.name in _EFFECTS or "array" in op.attrs or has_effect(op):
        return None
    return op.name, tuple(map(id, op.operands)), tuple(r.type for r in op.results), tuple(r.layout for r in op.results)


def _attributes(op: Op) -> str:
    return repr(sorted(op.attrs.items(), key=lambda kv: kv[0]))


class _Seen:
    """The operations of one key. Attributes are compared only when a second one occurs, which is rare."""

    def __init__(self, first: Op):
        self.first = first
        self.by_attributes: dict[str, Op] = {}

    def equal(self, op: Op) -> Op | None:
        """Return an equal earlier operation; otherwise record `op` and return None."""
        if not self.by_attributes:
            self.by_attributes[_attributes(self.first)] = self.first
        known = self.by_attributes.setdefault(_attributes(op), op)
        return None if known is op else known


def share_equal_operations(block: Block) -> None:
    """Common subexpression elimination in one block. Barriers define new values, so remat is preserved."""
    for op in block.ops:
        for region in op.regions:
            share_equal_operations(region)
    seen: dict[tuple, _Seen] = {}
    replacement: dict[Value, Value] = {}
    kept = []
    for op in block.ops:
        op.operands = [replacement.get(v, v) for v in op.operands]
        key = _key(op)
        if key is not None and key in seen:
            known = seen[key].equal(op)
            if known is not None:
                replacement.update(zip(op.results, known.results))
                continue
        elif key is not None:
            seen[key] = _Seen(op)
        kept.append(op)
    block.ops = kept
    substitute(block, replacement)


def remove_unread(block: Block) -> None:
    """Dead code elimination: unread operations, and carried loop values that only feed themselves."""
    live = {id(v) for v in block.results}
    kept = []
    for op in reversed(block.ops):
        if not any(id(r) in live for r in op.results) and not has_effect(op):
            continue
        for region in op.regions:
            remove_unread(region)
            live.update(id(v) for v in free_values(region))
        live.update(id(v) for v in op.operands)
        kept.append(op)
    block.ops = kept[::-1]


def uses(block: Block) -> dict[Value, int]:
    """Count the reads of each value in a block, including inner regions and results."""
    count: dict[Value, int] = {}

    def visit(b: Block) -> None:
        for op in b.ops:
            for v in op.operands:
                count[v] = count.get(v, 0) + 1
            for r in op.regions:
                visit(r)
        for v in b.results:
            count[v] = count.get(v, 0) + 1

    visit(block)
    return count


def behind_barriers(v: Value) -> Value:
    """Map results of remat's barriers to their operands, for values that need not be recomputed with the layer."""
    while v.producer is not None and v.producer.name == "optimization_barrier":
        v = v.producer.operands[v.producer.results.index(v)]
    return v
