"""Gather and scatter in all forms, and random bits.

An indexed dimension may be sharded: each device handles the indices in its shard (others give zero, or write nothing)
and Shardy's all_reduce sums the results. An embedding table is never gathered.
"""

from __future__ import annotations

from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import BIT_UNSIGNED, Literal, Operand
from npu_bridge.compiler.codegen.shaping import index_code
from npu_bridge.compiler.ir import Op, body_kind
from npu_bridge.compiler.partition import COMBINED_SCATTERS

PHILOX = ("DEFAULT", "PHILOX")  # XLA's default is Philox on every back end but the TPU's


def _shard_text(op: Op) -> str:
    """Write code for {dim: (start, whole)} from {dim: (axes, whole size)} of the sharded indexed dimensions."""
    shards = op.attrs["shards"]
    if not shards:
        return ""
    local = op.operands[0].shape
    items = ", ".join(
        f"{d}: (rt.index({axes}) * {local[d]}, {op.attrs['global_sizes'][d]})" for d, axes in shards.items()
    )
    return f", shards={{{items}}}"


@lowering("gather")
def gather(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, indices = (e.tensor(a) for a in args)
    a = op.attrs
    rows = (
        len(a["start_index_map"]) == 1
        and a["collapsed_slice_dims"] == a["start_index_map"]
        and not a["operand_batching_dims"]
        and a["index_vector_dim"] == len(indices.type.shape) - 1
    )
    if rows:
        dim = a["start_index_map"][0]
        whole = all(n == m for d, (n, m) in enumerate(zip(x.type.shape, a["slice_sizes"])) if d != dim)
        batch = len(indices.type.shape) - 1
        in_place = list(a["offset_dims"]) == [
            d if d < dim else d + batch - 1 for d in range(len(x.type.shape)) if d != dim
        ]
        if whole and in_place:
            code = f"T.take({x.name}, {index_code(e, indices)}, {dim}{_shard_text(op)})"
            return e.emit(code, [x, indices], op.result.type, kind="gather")
    numbers = {
        k: a[k]
        for k in (
            "offset_dims",
            "collapsed_slice_dims",
            "operand_batching_dims",
            "start_indices_batching_dims",
            "start_index_map",
            "index_vector_dim",
            "slice_sizes",
        )
    }
    text = ", ".join(f"{k}={v}" for k, v in numbers.items())
    return e.emit(
        f"T.gather({x.name}, {index_code(e, indices)}, {text}{_shard_text(op)})",
        [x, indices],
        op.result.type,
        kind="gather",
    )


_SCATTERS = ("add", "multiply", "maximum", "minimum", "replace")


def _is_splat(x: Operand, number: int) -> bool:
    return isinstance(x, Literal) and x.value == number


@lowering("scatter")
def scatter(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Write a scatter of one array, with a known combiner or any body of the program."""
    x, indices, updates = (e.tensor(a) for a in args)
    a = op.attrs
    mode = body_kind(op.regions[0])
    if mode == "subtract" and op.regions[0].ops[0].operands == op.regions[0].params:
        mode, updates = "add", e.emit(f"-{updates.name}", [updates], updates.type, kind="negate")
    if a.get("once") and not _is_splat(args[0], COMBINED_SCATTERS[mode]):
        code = (
            f"{x.name}.clone() if rt.index({a['once']}) == 0 else torch.full_like({x.name}, {COMBINED_SCATTERS[mode]})"
        )
        x = e.emit(code, [x], x.type, kind="scatter")
    numbers = {
        k: a[k]
        for k in (
            "update_window_dims",
            "inserted_window_dims",
            "input_batching_dims",
            "scatter_indices_batching_dims",
            "scattered_dims_to_operand_dims",
            "index_vector_dim",
        )
    }
    text = ", ".join(f"{k}={v}" for k, v in numbers.items())
    if mode not in _SCATTERS:
        unique = bool(a.get("unique_indices"))
        if not unique and e.device != "cpu" and not e.allow_host_sync:
            e.problem(
                op,
                "its body is not one of add, multiply, maximum, minimum, replace, and indices may repeat, which the "
                "host must count; pass unique_indices=True, or compile with allow_host_sync=True",
            )
        mode = e.function(op, op.regions[0], "combine")
        if mode is None:
            return Literal(0, op.result.type)
        text += f", unique={unique}"
    else:
        mode = repr(mode)
        if x.type.dtype in BIT_UNSIGNED and mode in ("'maximum'", "'minimum'"):
            text += ", unsigned=True"
    rest = f"{index_code(e, indices)}, {updates.name}, {mode}, {text}{_shard_text(op)})"
    return e.emit(
        f"T.scatter_({x.name}.clone(), {rest}",
        [x, indices, updates],
        op.result.type,
        inplace=[(x, f"T.scatter_({x.name}, {rest}")],
        kind="scatter",
    )


def _first(op: Op) -> str:
    return f"rt.index({op.attrs['axes']}) * {op.operands[0].shape[-1]}" if op.attrs["axes"] else "0"


@lowering("pick")
def pick(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, index = (e.tensor(a) for a in args)
    return e.emit(f"T.pick({x.name}, {index.name}, {_first(op)})", [x, index], op.result.type, kind="pick")


@lowering("add_at")
def add_at(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, index = (e.tensor(a) for a in args)
    rest = f"{index.name}, {_first(op)}, {op.attrs['number']})"
    return e.emit(
        f"T.add_at({x.name}.clone(), {rest}",
        [x, index],
        op.result.type,
        inplace=[(x, f"T.add_at({x.name}, {rest}")],
        kind="add_at",
    )


@lowering("rng_bit_generator")
def rng_bit_generator(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    state = e.tensor(args[0])
    bits, algorithm = op.results[1].type, op.attrs["rng_algorithm"]
    if algorithm not in PHILOX or state.type.dtype != "ui64" or bits.dtype not in ("ui8", "ui16", "ui32", "ui64"):
        e.problem(
            op,
            f"bits of {bits.dtype} by {algorithm} from a state of {state.type} have no torch form; use "
            "Philox or jax's default threefry keys",
        )
    code = f"T.rng_bit_generator({state.name}, {bits.shape}, {bits.dtype!r})"
    return list(e.emit_many(code, [state], [r.type for r in op.results], kind="rng_bit_generator"))
