"""Add a bias before a narrow product is rounded (on a CPU).

``x @ w + b`` in bfloat16 would round the bias, the product and their sum, 1.5 times the error of the single rounding
that a dense layer promises. Instead the product returns float32, the uncast bias is added, and the result is rounded
once. On npu the fused call takes the bias (`fused_calls`).
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Type, Value
from npu_bridge.compiler.passes.fused_calls import product_and_bias
from npu_bridge.compiler.passes.simplify import uses

_NARROW = frozenset({"bf16", "f16"})


def add_biases_before_rounding(block: Block) -> None:
    """Rewrite a block and its regions in place.

    Products with other readers or partial sums over devices stay.
    """
    count = uses(block)
    kept: list[Op] = []
    for op in block.ops:
        for region in op.regions:
            add_biases_before_rounding(region)
        kept += _widened(op, count) or [op]
    block.ops = kept


def _widened(op: Op, count: dict[Value, int]) -> list[Op] | None:
    if op.name != "add" or op.result.dtype not in _NARROW:
        return None
    for made, bias in product_and_bias(op, count):
        bias = _before_rounding(bias)

        def whole(shape, layout):
            return Value(Type(shape, "f32"), layout)

        vector = Op(
            "reshape", [bias], [Value(Type(op.result.shape[-1:], bias.dtype), bias.layout[-1:])], location=op.location
        )
        wide = Op("convert", [vector.result], [whole(vector.result.shape, bias.layout[-1:])], location=op.location)
        every = Op("broadcast_in_dim", [wide.result], [whole(op.result.shape, op.result.layout)],
                   {"broadcast_dimensions": [len(op.result.shape) - 1]}, location=op.location)  # fmt: skip
        sums = Op(
            "dot_general", made.operands, [whole(op.result.shape, op.result.layout)], made.attrs, location=made.location
        )
        total = Op("add", [sums.result, every.result], [whole(op.result.shape, op.result.layout)], location=op.location)
        return [vector, wide, every, sums, total, Op("convert", [total.result], op.results, location=op.location)]
    return None


def _before_rounding(vector: Value) -> Value:
    """Return the float32 vector that was cast to this one, or the vector itself."""
    v = vector
    while (
        v.producer is not None
        and v.producer.name in ("reshape", "broadcast_in_dim")
        and v.producer.operands[0].type.size == v.type.size
    ):
        (v,) = v.producer.operands
    if v.producer is not None and v.producer.name == "convert" and v.producer.operands[0].dtype == "f32":
        return v.producer.operands[0]
    return vector
