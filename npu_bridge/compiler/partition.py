"""Run Shardy's passes in an order that gives correct and cheap per-device programs.

After `partition` every value carries its sharding and every exchange is an explicit ``sdy`` collective. Three things
are done besides running the passes:

* `_strict_rules`: operations that read neighbours or move elements along a dimension (slice, pad, concatenate,
convolution, windows, updates at an index) get a rule that requires these dimensions unsharded. Shardy's own rules allow
some shardings that change the result of a local program.
* `_batch_first`: shardings of state get priority 1, so that those of the batch and of constraints (priority 0) reach a
fixed
  point first. Otherwise residuals of a scan take the parameters' shardings.
* `_plain_rules`: rules marked ``custom`` get no reshards inserted around them, and lose all_reduces silently; the mark
is
  dropped once propagation is over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import sdy

from npu_bridge.errors import UnsupportedError
from npu_bridge.sharding_rule import ShardingRule

_SHARDED_DIM = re.compile(r'\{("[^{}]*)\}')


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(ir.RankedTensorType(value.type).shape)


def _functions(module: ir.Module):
    return [f for f in module.body.operations if f.operation.name == "func.func"]


def _batch_first(module: ir.Module, state: Sequence[bool]) -> None:
    main = next(f for f in _functions(module) if f.sym_name.value == "main")
    results = len(main.operation.attributes["res_attrs"]) if "res_attrs" in main.operation.attributes else 0
    for kind, lower_priority in (("arg_attrs", list(state)), ("res_attrs", [True] * results)):
        if kind not in main.operation.attributes:
            continue
        changed = []
        for attrs, lower in zip(main.operation.attributes[kind], lower_priority, strict=True):
            items = {a if isinstance(a, str) else a.name: attrs[a if isinstance(a, str) else a.name] for a in attrs}
            if lower and "sdy.sharding" in items:
                items["sdy.sharding"] = ir.Attribute.parse(_SHARDED_DIM.sub(r"{\1}p1", str(items["sdy.sharding"])))
            changed.append(ir.DictAttr.get(items))
        main.operation.attributes[kind] = ir.ArrayAttr.get(changed)


_DIMS = re.compile(r"\[((?:\{[^{}]*\}(?:p\d+)?(?:, )?)*)\]")
_AXIS = re.compile(r'"([^"]+)"(?::\((\d+)\)(\d+))?')


def _even_constraints(module: ir.Module) -> None:
    """Leave axes out of a constraint that would split a dimension unevenly.

    XLA pads such dimensions in every operation that follows. A constraint changes no value, so the dimension stays
    whole over these axes instead.
    """
    sizes = {
        sdy.MeshAxisAttr(a).name: sdy.MeshAxisAttr(a).size
        for op in module.body.operations
        if op.operation.name == "sdy.mesh"
        for a in sdy.MeshAttr(op.operation.attributes["mesh"]).axes
    }

    def even(dim: str, size: int) -> str:
        shards, kept = 1, []
        for found in _AXIS.finditer(dim):
            shards *= int(found[3] or sizes[found[1]])
            if size % shards:
                return "{" + ", ".join(kept) + "}"
            kept.append(found[0])
        return dim

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in ("sdy.sharding_constraint", "sdy.reshard") and sizes:
            text, shape = str(op.attributes["sharding"]), _shape(op.results[0])
            if (found := _DIMS.search(text)) is not None:
                dims = re.findall(r"\{[^{}]*\}(?:p\d+)?", found[1])
                changed = [even(dim, size) for dim, size in zip(dims, shape)]
                if changed != dims:
                    text = f"{text[: found.start()]}[{', '.join(changed)}]{text[found.end() :]}"
                    op.attributes["sharding"] = ir.Attribute.parse(text)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


def _plain_rules(module: ir.Module) -> None:
    def visit(op: ir.Operation) -> ir.WalkResult:
        if "sdy.sharding_rule" in op.attributes:
            text = str(op.attributes["sdy.sharding_rule"]).replace(", custom>", ">")
            op.attributes["sdy.sharding_rule"] = ir.Attribute.parse(text)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


# ---- strict rules
# ---------------------------------------------------------------------------------------------------------


def _elementwise_but(op: ir.Operation, operand_count: int) -> tuple[list, list]:
    """Build a rule: dims that keep their size share a factor, others get their own and are replicated."""
    shapes = [_shape(o) for o in op.operands][:operand_count]
    out = _shape(op.results[0])
    same = [all(len(s) == len(out) and s[d] == out[d] for s in shapes if s) for d in range(len(out))]

    def name(v, d):
        return f"d{d}" if same[d] else f"whole{v}_{d}"

    return [[(name(i, d),) for d in range(len(s))] for i, s in enumerate(shapes)], [
        (name("r", d),) for d in range(len(out))
    ]


def _rule_pad(op: ir.Operation):
    """Check padding amounts, not sizes: a pad can keep the size and still shift (low 1, high -1)."""
    moved = [
        any(n)
        for n in zip(*(list(op.attributes[k]) for k in ("edge_padding_low", "edge_padding_high", "interior_padding")))
    ]

    def side(kind):
        return [(f"whole_{kind}{d}" if m else f"d{d}",) for d, m in enumerate(moved)]

    return [side("x"), []], [side("y")]


def _rule_slice(op: ir.Operation):
    ins, out = _elementwise_but(op, 1)
    return ins, [out]


def _rule_concatenate(op: ir.Operation):
    axis = ir.IntegerAttr(op.attributes["dimension"]).value

    def dims(i, s):
        return [(f"whole{i}" if d == axis else f"d{d}",) for d in range(len(s))]

    return [dims(i, _shape(o)) for i, o in enumerate(op.operands)], [dims("r", _shape(op.results[0]))]


def _rule_reverse(op: ir.Operation):
    turned = list(op.attributes["dimensions"])
    dims = [(f"whole{d}" if d in turned else f"d{d}",) for d in range(len(_shape(op.results[0])))]
    return [dims], [dims]


def _rule_dynamic(op: ir.Operation):
    """dynamic_slice(x, starts...) and dynamic_update_slice(x, update, starts...)."""
    update = op.name.endswith("update_slice")
    x, small = _shape(op.operands[0]), _shape(op.operands[1] if update else op.results[0])
    big = [(f"d{d}" if n == m else f"whole_x{d}",) for d, (n, m) in enumerate(zip(x, small))]
    little = [(f"d{d}" if n == m else f"whole_u{d}",) for d, (n, m) in enumerate(zip(x, small))]
    scalars: list[list] = [[] for _ in range(len(op.operands) - (2 if update else 1))]
    return ([big, little, *scalars], [big]) if update else ([big, *scalars], [little])


def _rule_window(op: ir.Operation):
    window = list(op.attributes["window_dimensions"])

    def plain(d):
        return window[d] == 1 and _shape(op.operands[0])[d] == _shape(op.results[0])[d]

    count = len(op.results)
    x = [(f"d{d}" if plain(d) else f"whole_x{d}",) for d in range(len(window))]
    y = [(f"d{d}" if plain(d) else f"whole_y{d}",) for d in range(len(window))]
    return [x] * count + [[]] * count, [y] * count


def _rule_select_and_scatter(op: ir.Operation):
    x, source = _shape(op.operands[0]), _shape(op.operands[1])
    same = [n == m and w == 1 for n, m, w in zip(x, source, op.attributes["window_dimensions"])]
    big = [(f"d{d}" if s else f"whole_x{d}",) for d, s in enumerate(same)]
    return [big, [(f"d{d}" if s else f"whole_s{d}",) for d, s in enumerate(same)], []], [big]


def _rule_pointwise(op: ir.Operation):
    """Shardy has no rules for CHLO; all that reach this point are element-wise."""

    def dims(v):
        return [(f"d{d}",) for d in range(len(_shape(v)))]

    return [dims(o) for o in op.operands], [dims(r) for r in op.results]


def _rule_replicated(op: ir.Operation):
    def name(kind, i, s):
        return [(f"whole_{kind}{i}_{d}",) for d in range(len(s))]

    ins = [name("o", i, _shape(v)) for i, v in enumerate(op.operands)]
    return ins, [name("r", i, _shape(v)) for i, v in enumerate(op.results)]


def _rule_convolution(op: ir.Operation):
    """Allow sharded batch, output features and input features (a sum); no sharded space, no sharded grouped
    convolution.
    """
    from jaxlib.mlir.dialects import stablehlo

    groups = [ir.IntegerAttr(op.attributes[k]).value for k in ("feature_group_count", "batch_group_count")]
    if groups != [1, 1]:
        return _rule_replicated(op)
    d = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    x, k, y = (len(_shape(v)) for v in (op.operands[0], op.operands[1], op.results[0]))
    lhs = {d.input_batch_dimension: "b", d.input_feature_dimension: "i"}
    rhs = {d.kernel_input_feature_dimension: "i", d.kernel_output_feature_dimension: "o"}
    out = {d.output_batch_dimension: "b", d.output_feature_dimension: "o"}

    def fill(named, rank, kind):
        return [(named.get(n, f"whole_{kind}{n}"),) for n in range(rank)]

    return [fill(lhs, x, "x"), fill(rhs, k, "k")], [fill(out, y, "y")]


def _rule_fft(op: ir.Operation):
    """Require the transformed dimensions unsharded."""
    transformed = len(list(op.attributes["fft_length"]))
    x, y = _shape(op.operands[0]), _shape(op.results[0])

    def side(shape, kind):
        return [(f"d{d}" if d < len(shape) - transformed else f"whole_{kind}{d}",) for d in range(len(shape))]

    return [side(x, "x")], [side(y, "y")]


COMBINED_SCATTERS = {
    "add": 0,
    "subtract": 0,
    "multiply": 1,
    "maximum": None,
    "minimum": None,
}  # and what changes nothing
_NEUTRAL = {"add": (0,), "multiply": (1,), "maximum": None, "minimum": None, "or": (0,), "and": None}


def _rule_reduce(op: ir.Operation):
    """Allow only sums, products, extremes and logic with a neutral start: an all_reduce can finish these."""
    body = [o.operation.name.split(".")[-1] for o in op.regions[0].blocks[0].operations]
    count = len(op.results)
    start = op.operands[-1].owner
    known = not isinstance(start, ir.Block) and start.name in ("stablehlo.constant", "sdy.constant")
    logic = body[0] in ("or", "and") and str(ir.RankedTensorType(op.results[0].type).element_type) != "i1"
    if count == 1 and len(body) == 2 and body[0] in _NEUTRAL and known and not logic:
        wanted = _NEUTRAL[body[0]]
        if "complex" in str(op.results[0].type):
            value = 0 if "(0.000000e+00,0.000000e+00)" in str(start) else None
        else:
            value = ir.DenseElementsAttr(start.attributes["value"]).get_splat_value().value
        if wanted is None or value in wanted:
            return None
    gone = list(op.attributes["dimensions"])
    x = [(f"whole{d}" if d in gone else f"d{d}",) for d in range(len(_shape(op.operands[0])))]
    y = [t for d, t in enumerate(x) if d not in gone]
    return [x] * count + [[]] * count, [y] * count


def _rule_scatter(op: ir.Operation):
    """Updates may be split over devices only where an all_reduce combines what each of them makes (Shardy's own rule).

    Which of several updates replaces an element, or in which order another body meets them, is known to a device that
    holds all of them.
    """
    from jaxlib.mlir.dialects import stablehlo

    body = [o.operation.name.split(".")[-1] for o in op.regions[0].blocks[0].operations]
    if len(op.results) == 1 and len(body) == 2 and body[0] in COMBINED_SCATTERS:
        return None
    d = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
    count = len(op.results)
    x, indices, updates = (_shape(op.operands[n]) for n in (0, count, count + 1))
    batching = dict(zip(d.scatter_indices_batching_dims, d.input_batching_dims))
    index_dims = [n for n in range(len(indices)) if n != d.index_vector_dim]
    whole_index = [(f"d{batching[n]}" if n in batching else f"whole_i{n}",) for n in range(len(indices))]
    window_of = [n for n in range(len(x)) if n not in (*d.inserted_window_dims, *d.input_batching_dims)]
    windows = dict(zip(d.update_window_dims, window_of))
    rest = iter(index_dims)
    update = []
    for n, size in enumerate(updates):
        if n in windows:
            full = size == x[windows[n]] and windows[n] not in d.scattered_dims_to_operand_dims
            update.append((f"d{windows[n]}" if full else f"whole_u{n}",))
        else:
            update.append(whole_index[next(rest)])
    operand = [(f"d{n}",) for n in range(len(x))]
    return [operand] * count + [whole_index] + [update] * count, [operand] * count


_STRICT: dict[str, Callable] = {
    "stablehlo.slice": _rule_slice,
    "stablehlo.pad": _rule_pad,
    "stablehlo.concatenate": _rule_concatenate,
    "stablehlo.reverse": _rule_reverse,
    "stablehlo.dynamic_slice": _rule_dynamic,
    "stablehlo.dynamic_update_slice": _rule_dynamic,
    "stablehlo.reduce_window": _rule_window,
    "stablehlo.select_and_scatter": _rule_select_and_scatter,
    "stablehlo.convolution": _rule_convolution,
    "stablehlo.reduce": _rule_reduce,
    "stablehlo.scatter": _rule_scatter,
    "stablehlo.fft": _rule_fft,
    "stablehlo.rng_bit_generator": _rule_replicated,
}


def _strict_rules(module: ir.Module) -> None:
    def visit(op: ir.Operation) -> ir.WalkResult:
        make = _rule_pointwise if op.name.startswith("chlo.") else _STRICT.get(op.name)
        found = make(op) if make is not None else None
        if found is not None:

            def tidy(values):
                return tuple(tuple(v) for v in values)

            sizes = {}
            for dims, value in zip([*found[0], *found[1]], [*op.operands, *op.results], strict=True):
                sizes.update({dim[0]: n for dim, n in zip(dims, _shape(value), strict=True)})
            rule = ShardingRule(tidy(found[0]), tidy(found[1]), sizes)
            whole = [f for f in rule.factors() if f.startswith("whole")]
            reduction = ["i"] if op.name == "stablehlo.convolution" else []
            op.attributes["sdy.sharding_rule"] = ir.Attribute.parse(rule.as_attribute(reduction, whole))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


def _run(module: ir.Module, pipeline: str) -> None:
    passes = passmanager.PassManager.parse(f"builtin.module({pipeline})")
    passes.enable_verifier(
        False
    )  # verifying after each of 36 passes costs more than the passes; `partition` verifies once
    try:
        passes.run(module.operation)
    except ir.MLIRError as error:
        raise UnsupportedError([f"Shardy pass {pipeline!r}: {error}"]) from error


def partition(module: ir.Module, state: Sequence[bool] = ()) -> ir.Module:
    """Run the passes on `module` in place and return it.

    Args:
      state: for each argument of the module whether its sharding has low priority (parameters, optimizer state).
    """
    with module.context, ir.Location.unknown():
        if any(state):
            _batch_first(module, state)
        _run(module, "cse")
        _even_constraints(module)
        _strict_rules(module)
        _run(module, "sdy-propagation-pipeline")
        _plain_rules(module)
        _run(module, "sdy-resolve-permutation-factors")
        _run(module, "func.func(sdy-insert-explicit-reshards{enable-full-version=true})")
        _run(module, "func.func(sdy-reshard-to-collectives)")
        # Run again at the end: propagation creates duplicate constants and reshards, which remat's barriers kept apart
        # before.
        _run(module, "cse,symbol-dce")
        try:
            module.operation.verify()
        except ir.MLIRError as error:
            raise UnsupportedError([f"Shardy's passes left a program that is not valid: {error}"]) from error
    return module
