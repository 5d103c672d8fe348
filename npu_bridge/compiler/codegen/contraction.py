"""Matrix products, convolution and reductions."""

from __future__ import annotations

import math

from npu_bridge.compiler.codegen.emitter import Emitter, lowering
from npu_bridge.compiler.codegen.operands import BIT_UNSIGNED, Literal, Operand, Tensor, torch_dtype
from npu_bridge.compiler.ir import FLOATS, Op, Type, body_kind


@lowering("dot_general")
def dot_general(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Write a dot_general as one ``mm`` or ``bmm`` over permuted views; with a bias as one ``addmm``."""
    x, y, *bias = (e.tensor(a) for a in args)
    lb, rb, lc, rc = (
        list(op.attrs[f"{s}_{k}_dimensions"]) for k in ("batching", "contracting") for s in ("lhs", "rhs")
    )
    order = sorted(range(len(lc)), key=lambda i: lc[i])  # contracting dims in memory order of the left operand
    lc, rc = [lc[i] for i in order], [rc[i] for i in order]
    lf = [i for i in range(len(x.type.shape)) if i not in lb + lc]
    rf = [i for i in range(len(y.type.shape)) if i not in rb + rc]

    def size(t, dims):
        return math.prod(t.type.shape[i] for i in dims)

    if [x.type.shape[i] for i in lc] != [y.type.shape[i] for i in rc] or [x.type.shape[i] for i in lb] != [
        y.type.shape[i] for i in rb
    ]:
        e.problem(op, f"local operands {x.type} and {y.type} do not fit together: their shards differ")
        return Literal(0, op.result.type)
    b, m, k, n = size(x, lb), size(x, lf), size(x, lc), size(y, rf)

    def arrange(t: Tensor, dims: list[int], shape: tuple[int, ...]) -> str:
        code = t.name if dims == list(range(len(dims))) else f"{t.name}.permute({tuple(dims)})"
        return code if shape == tuple(t.type.shape[i] for i in dims) else f"{code}.reshape({shape})"

    if lb:
        left, right, made = arrange(x, lb + lf + lc, (b, m, k)), arrange(y, rb + rc + rf, (b, k, n)), (b, m, n)
    else:
        left, right, made = arrange(x, lf + lc, (m, k)), arrange(y, rc + rf, (k, n)), (m, n)
    product = "bmm" if lb else "mm"
    if bias:
        code = f"torch.addmm({bias[0].name}, {left}, {right})"
    elif x.type.dtype == y.type.dtype == op.result.dtype and op.result.dtype in FLOATS:
        code = f"torch.{product}({left}, {right})"
    else:  # a wider result type is the accumulator's: products of the narrow type are summed in the wide one
        code = f"T.{product}({left}, {right}, {torch_dtype(op.result.dtype)})"
    if made != op.result.shape:
        code += f".view({op.result.shape})"
    return e.emit(code, [x, y, *bias], op.result.type, kind="dot_general")


MOST_SPATIAL_DIMS = 3  # torch.nn.functional.conv3d


@lowering("convolution")
def convolution(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    x, k = (e.tensor(a) for a in args)
    a = op.attrs
    rank = len(a["input_spatial_dimensions"])
    if rank > MOST_SPATIAL_DIMS:
        e.problem(op, f"{rank} spatial dimensions; torch has convolutions over up to {MOST_SPATIAL_DIMS}")
    lhs = (a["input_batch_dimension"], a["input_feature_dimension"], *a["input_spatial_dimensions"])
    rhs = (a["kernel_output_feature_dimension"], a["kernel_input_feature_dimension"], *a["kernel_spatial_dimensions"])
    out = (a["output_batch_dimension"], a["output_feature_dimension"], *a["output_spatial_dimensions"])
    back = tuple(out.index(d) for d in range(len(out)))
    ones, zeros = [1] * rank, [[0, 0]] * rank
    options = {
        "stride": a.get("window_strides") or ones,
        "padding": a.get("padding") or zeros,
        "lhs_dilation": a.get("lhs_dilation") or ones,
        "rhs_dilation": a.get("rhs_dilation") or ones,
        "reverse": [bool(r) for r in a.get("window_reversal") or []],
        "feature_groups": a["feature_group_count"],
        "batch_groups": a["batch_group_count"],
    }
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    code = (
        f"T.convolution({x.name}.permute({lhs}), {k.name}.permute({rhs}), {text}, "
        f"dtype={torch_dtype(op.result.dtype)}).permute({back})"
    )
    return e.emit(code, [x, k], op.result.type, kind="convolution")


_REDUCE = {"add": "sum", "maximum": "amax", "minimum": "amin", "multiply": "prod", "or": "any", "and": "all"}
_IDENTITY = {"add": 0, "multiply": 1, "maximum": -math.inf, "minimum": math.inf, "or": 0, "and": 1}


def _is_identity(kind: str, init: Operand) -> bool:
    if not isinstance(init, Literal):
        return False
    dtype, value = init.type.dtype, init.value
    if dtype in FLOATS or kind in ("add", "multiply"):
        return value == _IDENTITY[kind]
    if dtype == "i1":
        return bool(value) == (kind in ("and", "minimum"))
    bits = {"i8": 8, "i16": 16, "i32": 32, "i64": 64}.get(dtype)
    if bits is None:
        return value == (0 if kind in ("or", "maximum") else -1)
    return value == {"maximum": -(1 << (bits - 1)), "minimum": (1 << (bits - 1)) - 1, "or": 0, "and": -1}[kind]


def broadcast_scalar(e: Emitter, x: Operand, type: Type) -> Operand:
    """Fill an array with one number."""
    if isinstance(x, Literal):
        return Literal(x.value, type)
    x = e.tensor(x)
    return (
        e.emit(f"{x.name}.expand({type.shape})", [x], type, alias=x, expands=True, kind="broadcast_in_dim")
        if type.shape
        else x
    )


@lowering("reduce")
def reduce(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    count = len(op.results)
    dims = tuple(op.attrs["dimensions"])
    kind = body_kind(op.regions[0])
    dtype = op.result.dtype
    simple = count == 1 and kind in _REDUCE and dtype not in BIT_UNSIGNED - {"ui32" if kind == "add" else ""}
    if simple and not (kind in ("or", "and") and dtype != "i1") and not (kind in ("add", "multiply") and dtype == "i1"):
        if not dims:
            return [args[0]]
        if any(args[0].type.shape[d] == 0 for d in dims):  # torch has no maximum of an empty array
            return [broadcast_scalar(e, args[1], op.result.type)]
        x, init = e.tensor(args[0]), args[1]
        if kind == "multiply" and len(dims) > 1:
            code = f"T.product({x.name}, {dims})"
        else:
            method = {"maximum": "any", "minimum": "all"}.get(kind, _REDUCE[kind]) if dtype == "i1" else _REDUCE[kind]
            widened = f", dtype={torch_dtype(dtype)}" if kind in ("add", "multiply") and dtype not in FLOATS else ""
            code = f"{x.name}.{method}({dims[0] if len(dims) == 1 else dims}{widened})"
        out = e.emit(code, [x], op.result.type, kind="reduce")
        if not _is_identity(kind, init):
            init = e.tensor(init)
            combine = {
                "add": "{} + {}",
                "multiply": "{} * {}",
                "maximum": "torch.maximum({}, {})",
                "minimum": "torch.minimum({}, {})",
                "or": "{} | {}",
                "and": "{} & {}",
            }[kind]
            out = e.emit(combine.format(out.name, init.name), [out, init], op.result.type, kind="reduce")
        return [out]
    body = e.function(op, op.regions[0], "combine")
    if body is None:
        return [Literal(0, r.type) for r in op.results]
    xs, inits = [e.tensor(a) for a in args[:count]], [e.tensor(a) for a in args[count:]]

    def names(ts):
        return "(" + ", ".join(t.name for t in ts) + ",)"

    code = f"T.tree_reduce({body}, {names(xs)}, {names(inits)}, {dims})"
    outs = e.emit_many(code + ("[0]" if count == 1 else ""), [*xs, *inits], [r.type for r in op.results], kind="reduce")
    return list(outs)


def _window(op: Op) -> str:
    rank = len(op.attrs["window_dimensions"])
    ones = [1] * rank
    a = op.attrs
    return (
        f"window={a['window_dimensions']}, strides={a.get('window_strides') or ones}, "
        f"base_dilations={a.get('base_dilations') or ones}, "
        f"window_dilations={a.get('window_dilations') or ones}, padding={a.get('padding') or [[0, 0]] * rank}"
    )


@lowering("reduce_window")
def reduce_window(e: Emitter, op: Op, args: list[Operand]) -> list[Operand]:
    count = len(op.results)
    xs, inits = [e.tensor(a) for a in args[:count]], [e.tensor(a) for a in args[count:]]
    kind = body_kind(op.regions[0])
    if (
        count == 1
        and kind in ("add", "maximum", "minimum", "multiply")
        and (op.result.dtype in FLOATS or op.result.dtype in ("i8", "i16", "i32", "i64"))
    ):
        code = f"T.reduce_window({xs[0].name}, {inits[0].name}, {kind!r}, {_window(op)})"
        return [e.emit(code, [*xs, *inits], op.result.type, kind="reduce_window")]
    body = e.function(op, op.regions[0], "combine")

    def names(ts):
        return "(" + ", ".join(t.name for t in ts) + ",)"

    code = f"T.reduce_window_with({body}, {names(xs)}, {names(inits)}, {_window(op)})"
    return list(
        e.emit_many(
            code + ("[0]" if count == 1 else ""), [*xs, *inits], [r.type for r in op.results], kind="reduce_window"
        )
    )


_FFT = {"FFT": "fftn", "IFFT": "ifftn", "RFFT": "rfftn", "IRFFT": "irfftn"}


@lowering("fft")
def fft(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """Transform the last dimensions, one for each length."""
    x, lengths = e.tensor(args[0]), tuple(op.attrs["fft_length"])
    sizes = f", s={lengths}" if op.attrs["fft_type"] == "IRFFT" else ""
    code = f"torch.fft.{_FFT[op.attrs['fft_type']]}({x.name}{sizes}, dim={tuple(range(-len(lengths), 0))})"
    return e.emit(code, [x], op.result.type, kind="fft")


@lowering("select_and_scatter")
def select_and_scatter(e: Emitter, op: Op, args: list[Operand]) -> Operand:
    """The gradient of max pooling (and min pooling): each window's source goes to its selected element."""
    x, source, init = (e.tensor(a) for a in args)
    select = op.regions[0]
    last = select.ops[-1] if select.ops else None
    direction = last.attrs.get("comparison_direction") if last is not None and last.name == "compare" else None
    if direction not in ("GE", "GT", "LE", "LT") or body_kind(op.regions[1]) != "add":
        e.problem(op, "only the gradients of max and min pooling are known")
        return Literal(0, op.result.type)
    rank = len(x.type.shape)
    a = op.attrs
    code = (
        f"T.select_and_scatter_add({x.name}, {source.name}, {init.name}, {direction!r}, "
        f"window={a['window_dimensions']}, "
        f"strides={a.get('window_strides') or [1] * rank}, padding={a.get('padding') or [[0, 0]] * rank})"
    )
    return e.emit(code, [x, source, init], op.result.type, kind="select_and_scatter")
