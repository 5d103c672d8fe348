"""Replace comparisons with an iota by indexing.

``where(targets[..., None] == iota, x, 0).sum(-1)`` picks one element of each row, and ``x - (targets[..., None] ==
iota)`` changes one: the cross entropy of an integer target and its gradient. Written as they stand they pass over the
whole array five and three times. The numbers are the same to the last bit: zeros were added, or subtracted. A sharded
last dimension stays sharded, because its iota begins at the shard's first index.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import FLOATS, Block, Op, Value, body_kind


def index_instead_of_comparing(block: Block) -> None:
    """Rewrite a block and its regions in place. Dead operations are left to `remove_unread`."""
    for n, op in enumerate(block.ops):
        for region in op.regions:
            index_instead_of_comparing(region)
        block.ops[n] = _picked(op) or _changed(op) or op


def _through_broadcasts(value: Value) -> tuple[Value, int | None]:
    """(what was broadcast, which of its dimensions became the last one of `value`; None when the last dimension only
    repeats it).
    """
    last: int | None = len(value.shape) - 1
    while (op := value.producer) is not None and op.name == "broadcast_in_dim" and last is not None:
        source, dims = op.operands[0], list(op.attrs["broadcast_dimensions"])
        at = dims.index(last) if last in dims else None
        last = None if at is None or source.shape[at] != value.shape[last] else at
        value = source
    return value, last


def _target(compared: Value) -> tuple[Value, tuple[str, ...]] | None:
    """(the index, of the compared shape and equal along the last dimension; axes over which the numbers it is compared
    with are split).
    """
    op = compared.producer
    if (
        op is None
        or op.name != "compare"
        or op.attrs["comparison_direction"] != "EQ"
        or not compared.shape
        or compared.shape[-1] == 1
    ):
        return None
    for numbers, index in (op.operands, op.operands[::-1]):
        line, last = _through_broadcasts(numbers)
        if last is None or line.producer is None or line.producer.name != "iota" or line.producer.attrs["dim"] != last:
            continue
        if line.dtype not in FLOATS and _through_broadcasts(index)[1] is None:
            return index, tuple(line.producer.attrs["axes"])
    return None


def _number(value: Value) -> float | None:
    while value.producer is not None and value.producer.name in ("broadcast_in_dim", "convert"):
        value = value.producer.operands[0]
    return (
        value.producer.attrs.get("splat") if value.producer is not None and value.producer.name == "constant" else None
    )


def _picked(op: Op) -> Op | None:
    """Sum over the last dimension of ``where(index == iota, x, 0)``."""
    if (
        op.name != "reduce"
        or len(op.results) != 1
        or op.result.dtype not in FLOATS
        or body_kind(op.regions[0]) != "add"
    ):
        return None
    chosen = op.operands[0]
    made = chosen.producer
    if (
        list(op.attrs["dimensions"]) != [len(chosen.shape) - 1]
        or _number(op.operands[1]) != 0
        or made is None
        or made.name != "select"
    ):
        return None
    compared, x, otherwise = made.operands
    found = _target(compared) if _number(otherwise) == 0 and compared.shape == x.shape else None
    if found is None:
        return None
    return Op("pick", [x, found[0]], [op.result], {"axes": found[1]}, location=op.location)


def _changed(op: Op) -> Op | None:
    """``x + (index == iota)`` and ``x - (index == iota)`` with the comparison as 0 or 1."""
    if op.name not in ("add", "subtract") or op.result.dtype not in FLOATS:
        return None
    orders = (op.operands, op.operands[::-1]) if op.name == "add" else (op.operands,)
    for x, ones in orders:
        made = ones.producer
        if made is None or made.name != "convert" or made.operands[0].dtype != "i1":
            continue
        if (found := _target(made.operands[0])) is not None:
            return Op(
                "add_at",
                [x, found[0]],
                [op.result],
                {"axes": found[1], "number": 1.0 if op.name == "add" else -1.0},
                location=op.location,
            )
    return None
