"""Adapt operators to the operands and results of torch_npu's fused calls.

On npu only, where every kernel is a launch: a layer then has as few launches as hand-written torch_npu code.

* the gradient of a rotation is a rotation with transposed tables, which separate operations compute once for all
layers;
* SwiGLU takes gate and up concatenated: the backward pass reuses the forward's concatenation;
* attention passes the kernel's softmax statistics to its gradient instead of the log-sum-exp (2 x 8 numbers in place of
one, as in torch's own autograd);
* products take their bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from npu_bridge.compiler.ir import FLOATS, Block, Op, Type, Value
from npu_bridge.compiler.passes.simplify import behind_barriers, uses
from npu_bridge.jaxcompat import CALL_PREFIX as PREFIX

STATISTICS = 8  # copies of each softmax statistic, as in npu_bridge.kernels.attention (which needs torch)


def fit_fused_calls(block: Block) -> None:
    """Rewrite a block and its regions in place."""
    for region in itertools.chain.from_iterable(op.regions for op in block.ops):
        fit_fused_calls(region)
    _keep_statistics(block)
    kept: list[Op] = []
    count = uses(block)
    for op in block.ops:
        rewrite = (
            _REWRITES.get(op.attrs["name"].removeprefix(PREFIX))
            if op.name == "kernel"
            else _with_bias
            if op.name == "add"
            else None
        )
        kept += (rewrite(op, count) if rewrite else None) or [op]
    block.ops = kept


def _made(name: str, operands: list[Value], like: Value, shape: Iterable[int], at: Op, **attrs) -> Op:
    """Make an operation with one result, with dtype and layout of another value."""
    return Op(name, operands, [Value(Type(tuple(shape), like.dtype), like.layout)], attrs, location=at.location)


def _kernel(name: str, op: Op, operands: list[Value], results: list[Value], **params) -> Op:
    attrs = {"name": PREFIX + name, "params": params, "expressions": {}, "inplace": {}, "host_operands": ()}
    return Op("kernel", operands, results, attrs, location=op.location)


def _slice(x: Value, dim: int, begin: int, end: int, at: Op, result: Value | None = None) -> Op:
    shape = list(x.shape)
    starts, limits = [0] * len(shape), list(shape)
    starts[dim], limits[dim], shape[dim] = begin, end, end - begin
    made = _made("slice", [x], x, shape, at, start_indices=starts, limit_indices=limits, strides=[1] * len(shape))
    if result is not None:
        made.results = [result]
        result.producer = made
    return made


# ---- rotary
# ------------------------------------------------------------------------------------------------------------------


def _transposed_table(sin: Value, mode: str, at: Op) -> list[Op]:
    """Make operations that transpose a rotation's table: (a, b) -> (-b, -a) in every pair."""
    *lead, width = sin.shape
    last = len(lead)
    if mode == "half":
        parts = [_slice(sin, last, width // 2, width, at), _slice(sin, last, 0, width // 2, at)]
        swapped = [*parts, _made("concatenate", [p.result for p in parts], sin, sin.shape, at, dimension=last)]
    else:
        pairs = _made("reshape", [sin], sin, (*lead, width // 2, 2), at)
        pairs.result.layout = (*sin.layout, ()) if sin.layout else ()
        other = _made("reverse", [pairs.result], pairs.result, pairs.result.shape, at, dimensions=[last + 1])
        swapped = [pairs, other, _made("reshape", [other.result], sin, sin.shape, at)]
    return [*swapped, _made("negate", [swapped[-1].result], sin, sin.shape, at)]


def _rotary_backward(op: Op, count: dict[Value, int]) -> list[Op]:
    g, cos, sin = op.operands
    mode = op.attrs["params"]["mode"]
    turned = _transposed_table(behind_barriers(sin), mode, op)
    return [*turned, _kernel("rotary", op, [g, cos, turned[-1].result], op.results, mode=mode)]


# ---- SwiGLU
# --------------------------------------------------------------------------------------------------------------------


def _side_by_side(gate: Value, up: Value, at: Op) -> Op:
    *lead, width = gate.shape
    return _made("concatenate", [gate, up], gate, (*lead, 2 * width), at, dimension=len(lead))


def _swiglu(op: Op, count: dict[Value, int]) -> list[Op]:
    both = _side_by_side(*op.operands, op)
    return [both, _kernel("swiglu_concatenated", op, [both.result], op.results)]


def _swiglu_backward(op: Op, count: dict[Value, int]) -> list[Op]:
    g, gate, up = op.operands
    both = _side_by_side(gate, up, op)
    grad = Value(both.result.type, both.result.layout)
    last, width = len(gate.shape) - 1, gate.shape[-1]
    parts = [_slice(grad, last, i * width, (i + 1) * width, op, result) for i, result in enumerate(op.results)]
    return [both, _kernel("swiglu_concatenated_backward", op, [g, both.result], [grad]), *parts]


# ---- attention
# ------------------------------------------------------------------------------------------------------------------

_FORWARD_LSE, _BACKWARD_LSE = 1, 5  # which result, which operand


def _keep_statistics(block: Block) -> None:
    """Pass the kernel's statistics to gradients if they are the only readers of the log-sum-exp, in the same block."""
    count = uses(block)
    readers: dict[Value, list[Op]] = {}
    for op in block.ops:
        if (
            op.name == "kernel"
            and op.attrs["name"].startswith(PREFIX + "attention")
            and op.attrs["name"].endswith("_backward")
        ):
            readers.setdefault(op.operands[_BACKWARD_LSE], []).append(op)
    for op in block.ops:
        if op.name != "kernel" or not op.attrs["name"].startswith(PREFIX + "attention") or len(op.results) != 2:
            continue
        lse = op.results[_FORWARD_LSE]
        own = [r for r in readers.get(lse, ()) if r.attrs["name"] == op.attrs["name"] + "_backward"]
        if len(own) != count.get(lse, 0):
            continue
        wide = Type((*lse.shape, STATISTICS), lse.dtype)
        kept = [Value(wide, (*lse.layout, ()) if lse.layout else (), op) for _ in range(2)]
        op.results[_FORWARD_LSE:] = kept
        op.attrs["params"] = op.attrs["params"] | {"statistics": True}
        for reader in own:
            reader.operands[_BACKWARD_LSE : _BACKWARD_LSE + 1] = kept
            reader.attrs["params"] = reader.attrs["params"] | {"statistics": True}
            reader.attrs["host_operands"] = tuple(i + (i > _BACKWARD_LSE) for i in reader.attrs["host_operands"])


# ---- products with a bias
# ----------------------------------------------------------------------------------------------------------


def spread(v: Value, width: int) -> Value | None:
    """Return the vector (.., 1, width) that a value broadcasts along its last dim, or None."""
    while v.type.size != width:
        made = v.producer
        if made is None or made.name not in ("broadcast_in_dim", "reshape"):
            return None
        (source,) = made.operands
        if made.name == "broadcast_in_dim":
            kept = [d for d, size in zip(made.attrs["broadcast_dimensions"], source.shape) if size > 1]
            if kept != sorted(kept) or (source.type.size != v.type.size and kept != [len(v.shape) - 1]):
                return None
        v = source
    return v


def product_and_bias(op: Op, count: dict[Value, int]) -> Iterator[tuple[Op, Value]]:
    """Match an addition of a product without other readers and a vector broadcast over its rows, in either order:
    (dot_general, vector).
    """
    width = op.result.shape[-1] if op.result.shape else 0
    for product, other in (op.operands, op.operands[::-1]):
        made = product.producer
        if (
            width < 2
            or made is None
            or made.name != "dot_general"
            or count[product] != 1
            or any(v.dtype != op.result.dtype for v in made.operands)
        ):
            continue
        bias = spread(other, width)
        if bias is not None:
            yield made, bias


def _with_bias(op: Op, count: dict[Value, int]) -> list[Op] | None:
    for made, bias in product_and_bias(op, count):
        free = [d for d in range(len(made.operands[1].shape)) if d not in made.attrs["rhs_contracting_dimensions"]]
        if (
            op.result.dtype not in FLOATS
            or len(made.operands) != 2
            or len(free) != 1
            or made.attrs["lhs_batching_dimensions"]
            or bias.dtype != op.result.dtype
        ):
            continue
        vector = Op(
            "reshape", [bias], [Value(Type(op.result.shape[-1:], bias.dtype), bias.layout[-1:])], location=op.location
        )
        return [
            vector,
            Op("dot_general", [*made.operands, vector.result], op.results, made.attrs, location=made.location),
        ]
    return None


_REWRITES = {"rotary_backward": _rotary_backward, "swiglu": _swiglu, "swiglu_backward": _swiglu_backward}
