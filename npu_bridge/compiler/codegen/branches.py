"""Branches chosen by a host value: only the chosen one runs."""

from __future__ import annotations

from collections.abc import Sequence

from npu_bridge.compiler.codegen.emitter import Emitter
from npu_bridge.compiler.codegen.operands import HostInt, Literal, Operand, Tensor
from npu_bridge.compiler.codegen.program import Assign, Branches, Item
from npu_bridge.compiler.ir import Op, Type


def branches(
    e: Emitter, index: HostInt, bodies: Sequence[tuple[list[Item], Operand | list[Operand]]], op: Op
) -> Operand | list[Operand]:
    """Write a branch over several bodies by a host integer. A number past the end takes the last body, as in StableHLO.

    bodies: items and results of each. A result that is a host number in every body stays one.
    """
    single = not isinstance(bodies[0][1], list)
    results = [[r] if single else r for _, r in bodies]
    outs: list[Operand] = []
    names: list[str] = []
    types: list[Type] = []
    chosen: list[list[str]] = [[] for _ in bodies]
    for choices in zip(*results):
        if all(c == choices[0] for c in choices):
            outs.append(choices[0])
            continue
        if all(isinstance(c, (Literal, HostInt)) and "f" not in c.type.dtype for c in choices):
            name = e.fresh("h")
            for (items, _), c in zip(bodies, choices):
                items.append(Assign([name], [host_code(c)]))
            outs.append(HostInt(name, choices[0].type, *bounds_of(choices)))
            continue
        out = Tensor(e.fresh(), choices[0].type)
        for (items, _), c, mine in zip(bodies, choices, chosen):
            with e.into(items):
                mine.append(e.tensor(c).name)
        outs.append(out)
        names.append(out.name)
        types.append(out.type)
    if names or any(items for items, _ in bodies):
        code = f"int({index.code})" if index.type.dtype == "i1" else index.code
        e.items.append(Branches(code, [items for items, _ in bodies], chosen, names, types, op.location))
    return outs[0] if single else outs


def host_code(value: Literal | HostInt) -> str:
    """Return the Python code of a host number's value."""
    if isinstance(value, HostInt):
        return value.code
    return repr(bool(value.value) if value.type.dtype == "i1" else int(value.value))


def bounds_of(values: Sequence[Literal | HostInt]) -> tuple[int | None, int | None]:
    """Return bounds that hold for all of them; (None, None) if unknown."""
    lows = [int(v.value) if isinstance(v, Literal) else v.low for v in values]
    highs = [int(v.value) if isinstance(v, Literal) else v.high for v in values]
    return (None, None) if None in lows or None in highs else (min(lows), max(highs))
