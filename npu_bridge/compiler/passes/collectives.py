"""Reduce the number and size of Shardy's collectives.

* ``all_slice(all_reduce(x))`` is a reduce_scatter; when only some of the axes are sliced, the scatter comes first and
the rest is
  reduced on the shard (fsdp inside a machine, data between machines).
* ``all_reduce(a) + all_reduce(b)`` over the same axes is ``all_reduce(a + b)``: input gradients of q, k, v and of gate
and up.
* ``all_gather(all_slice(x))`` and ``all_slice(all_gather(x))`` over the same axes are x.
* sums of 16-bit floats are exchanged in float32 when the policy asks for it.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Program, Type, Value, substitute
from npu_bridge.compiler.passes.simplify import uses


def fuse_collectives(program: Program) -> None:
    _each_block(program.body, lambda b: _cancel(b))
    _each_block(program.body, lambda b: _scatter(b, program))
    _each_block(program.body, lambda b: _merge_sums(b))


def _each_block(block: Block, rewrite) -> None:
    for op in block.ops:
        for region in op.regions:
            _each_block(region, rewrite)
    rewrite(block)


def _same_dims(a: Op, b: Op) -> bool:
    return [tuple(d) for d in a.attrs["dims"]] == [tuple(d) for d in b.attrs["dims"]]


def _cancel(block: Block) -> None:
    replacement: dict[Value, Value] = {}
    pairs = {("all_gather", "all_slice"), ("all_slice", "all_gather")}
    for op in block.ops:
        if not op.operands:
            continue
        made = replacement.get(op.operands[0], op.operands[0]).producer
        if (
            made is not None
            and (op.name, made.name) in pairs
            and _same_dims(op, made)
            and made.operands[0].type == op.result.type
        ):
            replacement[op.result] = made.operands[0]
    substitute(block, replacement)


# ---- all_reduce + all_slice -> reduce_scatter
# -------------------------------------------------------------------------------


def _scattered(x: Value, dims: list[tuple[str, ...]], program: Program) -> Type:
    shape = tuple(n // program.mesh.size(tuple(a)) for n, a in zip(x.shape, dims))
    return Type(shape, x.dtype)


def _scatter(block: Block, program: Program) -> None:
    """Replace an all_reduce whose only readers are all_slices by a reduce_scatter."""
    count = uses(block)
    readers: dict[Value, list[Op]] = {}
    for op in block.ops:
        for v in op.operands:
            readers.setdefault(v, []).append(op)
    kept: list[Op] = []
    dropped: set[int] = set()
    for op in block.ops:
        if op.name != "all_reduce":
            continue
        slices = readers.get(op.result, [])
        axes = set(op.attrs["axes"])
        fits = slices and len(slices) == count.get(op.result, 0) == 1 and slices[0].name == "all_slice"
        if not fits:
            continue
        cut = [tuple(d) for d in slices[0].attrs["dims"]]
        if not {a for d in cut for a in d} & axes or any(set(d) & axes and not set(d) <= axes for d in cut):
            continue
        dropped.add(id(op))
        slices[0].attrs["fuse"] = op
    if not dropped:
        return
    for op in block.ops:
        if id(op) in dropped:
            continue
        source = op.attrs.pop("fuse", None) if op.name == "all_slice" else None
        if source is None:
            kept.append(op)
            continue
        axes = set(source.attrs["axes"])
        cut = [tuple(d) for d in op.attrs["dims"]]
        inside = [d if set(d) <= axes else () for d in cut]
        outside = [d if not set(d) & axes else () for d in cut]
        value = source.operands[0]
        if any(outside):  # slice locally before sending
            made = Op(
                "all_slice",
                [value],
                [Value(_scattered(value, outside, program), op.result.layout)],
                {"dims": outside},
                location=op.location,
            )
            kept.append(made)
            value = made.result
        order = tuple(a for d in inside for a in d)
        rest = tuple(a for a in source.attrs["axes"] if a not in order)
        attrs = {"dims": inside, "kind": source.attrs["kind"], "axes": order}
        scatter = Op(
            "reduce_scatter",
            [value],
            [op.result if not rest else Value(op.result.type, op.result.layout)],
            attrs,
            location=source.location,
        )
        kept.append(scatter)
        if rest:
            kept.append(
                Op(
                    "all_reduce",
                    [scatter.result],
                    [op.result],
                    {"axes": rest, "kind": source.attrs["kind"]},
                    location=source.location,
                )
            )
    block.ops = kept


# ---- sums of reductions
# ---------------------------------------------------------------------------------------------------------


def _signature(op: Op | None) -> tuple | None:
    """Key of reductions that can be merged into one over their sum."""
    if op is None or op.attrs.get("kind") != "add":
        return None
    if op.name == "all_reduce":
        return ("all_reduce", tuple(op.attrs["axes"]))
    if op.name == "reduce_scatter":
        return ("reduce_scatter", tuple(tuple(d) for d in op.attrs["dims"]), op.operands[0].type)
    return None


def _merge_sums(block: Block) -> None:
    count = uses(block)
    inside = {id(op) for op in block.ops}

    def once(v):
        return count.get(v, 0) == 1 and v.producer is not None and id(v.producer) in inside

    def is_sum(op):
        return op is not None and op.name == "add" and "f" in op.result.dtype

    absorbed = {
        id(v.producer) for op in block.ops if is_sum(op) for v in op.operands if once(v) and is_sum(v.producer)
    }  # sums absorbed by a larger sum
    replaced: dict[int, list[Op]] = {}
    dropped: set[int] = set()
    for op in block.ops:
        if not is_sum(op) or id(op) in absorbed:
            continue
        leaves: list[Value] = []
        tree: list[Op] = []
        todo = [op]
        while todo:
            node = todo.pop()
            tree.append(node)
            for v in reversed(node.operands):
                if once(v) and is_sum(v.producer) and id(v.producer) in absorbed:
                    todo.append(v.producer)
                else:
                    leaves.append(v)
        groups: dict[tuple, list[Value]] = {}
        for v in leaves:
            signature = _signature(v.producer) if once(v) else None
            if signature is not None:
                groups.setdefault(signature, []).append(v)
        groups = {k: vs for k, vs in groups.items() if len(vs) > 1}
        if not groups:
            continue
        taken = {id(v) for vs in groups.values() for v in vs}
        terms = [v for v in leaves if id(v) not in taken]
        new: list[Op] = []
        for members in groups.values():
            first = members[0].producer
            total = members[0].producer.operands[0]
            for v in members[1:]:
                part = v.producer.operands[0]
                new.append(Op("add", [total, part], [Value(total.type, total.layout)], location=op.location))
                total = new[-1].result
            new.append(
                Op(
                    first.name,
                    [total],
                    [Value(op.result.type, op.result.layout)],
                    dict(first.attrs),
                    location=first.location,
                )
            )
            terms.append(new[-1].result)
            dropped.update(id(v.producer) for v in members)
        total = terms[0]
        for n, term in enumerate(terms[1:]):
            last = n == len(terms) - 2
            new.append(
                Op(
                    "add",
                    [total, term],
                    [op.result if last else Value(op.result.type, op.result.layout)],
                    location=op.location,
                )
            )
            total = new[-1].result
        if len(terms) == 1:
            new[-1].results = [op.result]
            op.result.producer = new[-1]
        replaced[id(op)] = new
        dropped.update(id(t) for t in tree)
    kept: list[Op] = []
    for op in block.ops:
        if id(op) in replaced:
            kept += replaced[id(op)]
        elif id(op) not in dropped:
            kept.append(op)
    block.ops = kept


# ---- precision
# ------------------------------------------------------------------------------------------------------------------


def widen_reductions(program: Program) -> None:
    """Widen cross-device sums of 16-bit floats to float32."""
    _each_block(program.body, _widen)


def _widen(block: Block) -> None:
    kept: list[Op] = []
    for op in block.ops:
        if (
            op.name in ("all_reduce", "reduce_scatter")
            and op.attrs["kind"] == "add"
            and op.result.dtype in ("bf16", "f16")
        ):
            x, y = op.operands[0], op.result

            def wide(v):
                return Value(Type(v.shape, "f32"), v.layout)

            up = Op("convert", [x], [wide(x)], location=op.location)
            exchange = Op(op.name, [up.result], [wide(y)], op.attrs, location=op.location)
            kept += [up, exchange, Op("convert", [exchange.result], [y], location=op.location)]
        else:
            kept.append(op)
    block.ops = kept
