"""The torch program as Python source: readable, the same on every rank, with scopes and source lines of the JAX
program.
"""

from __future__ import annotations

import dataclasses
import os
import re

from npu_bridge.compiler import exchange_order
from npu_bridge.compiler.codegen import contraction, control, elementwise, exchange, host_memory, indexing, shaping  # noqa: F401  (register lowerings)
from npu_bridge.compiler.codegen.emitter import Emitter
from npu_bridge.compiler.codegen.program import Assign, Stmt, remove_dead, walk
from npu_bridge.compiler.ir import Location, Program
from npu_bridge.compiler.memory import Plan, Planner
from npu_bridge.errors import UnsupportedError


@dataclasses.dataclass
class Source:
    """The cached program: its text and the data that the runtime and the reports need."""

    text: str
    constants: list[tuple]
    kernels: list[dict]
    collectives: list[dict]
    memory: dict[str, int]
    statements: int
    axes_used: list[tuple[str, ...]]
    operations: dict[str, int]
    host_arguments: list[int]  # arguments that kernels read on the host


def _scope(location: Location) -> str:
    """``jit(step)/layer/attention/dot_general`` -> ``layer/attention``."""
    parts = [p for p in location.scope.split("/")[:-1] if not p.startswith("jit(")]
    return "/".join(parts)


def _without_unread_numbers(lines: list[tuple]) -> list[tuple]:
    """Remove dead host computations."""
    while True:
        read: set[str] = set()
        for _, code, source in lines:
            text = code.split(" = ", 1)[1] if isinstance(source, Assign) else code
            read.update(_HOST_NAME.findall(text))
        kept = [line for line in lines if not isinstance(line[2], Assign) or any(n in read for n in line[2].names)]
        if len(kept) == len(lines):
            return kept
        lines = kept


_HOST_NAME = re.compile(r"\bh\d+\b")


def _text(program: Program, params: list[str], tables: list[str], plan: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.axes) or "one device"
    lines = [
        f'"""One step of `{program.name}` on one device of {mesh}. Written by npu_bridge; the text is the '
        "same on every rank.",
        "",
        "rt: this rank's runtime (collectives, kernels, device, host copies of arguments). K: constants on "
        "the device. args: local shards; the list is emptied",
        'so that donated arrays die at their last use."""',
        "import torch",
        "from npu_bridge.runtime import tensor_ops as T",
        "",
        "",
        "def main(rt, K, args):",
        f"    [{', '.join(params)}] = args",
        "    args.clear()",
    ]
    for table in reversed(tables):
        lines.insert(-3, table)
    last: tuple[str, str] | None = None
    for indent, code, source in _without_unread_numbers(plan.lines):
        pad = "    " * indent
        if isinstance(source, Stmt):
            place = os.path.basename(source.location.file)
            here = (_scope(source.location), f"{place}:{source.location.line}" if place else "")
            if any(here) and here != last:
                lines.append(f"{pad}# {'  '.join(h for h in here if h)}")
                last = here
            lines.append(f"{pad}{code}  # {', '.join(map(str, source.types))}" if source.types else pad + code)
        else:
            lines.append(pad + code)
    lines.append(f"    return [{', '.join(plan.results)}]")
    return "\n".join(lines) + "\n"


def generate(program: Program, *, allow_host_sync: bool = False, device: str = "cpu") -> Source:
    """Write a program. Raises UnsupportedError with everything that has no torch form."""
    emitter = Emitter(program, allow_host_sync=allow_host_sync, device=device)
    params, results = emitter.run()
    items = remove_dead(emitter.items, set(results))
    tables = [
        f"{name} = {tuple(map(bool, values)) if boolean else values}"
        for (values, boolean), name in emitter.tables.items()
    ]
    if hanging := exchange_order.problems(items, program.mesh, tables):
        raise UnsupportedError(hanging)
    types = {p: v.type for p, v in zip(params, program.body.params)}
    donated = {p for p, d in zip(params, program.donated) if d}
    hosted = {p for p, v in zip(params, program.body.params) if v.host}
    plan = Planner(types, donated, hosted).run(items, results)
    memory = {
        "argument_bytes": plan.argument_bytes,
        "peak_bytes": plan.peak_bytes,
        "inplace_updates": plan.inplace,
        "copies": plan.copies,
        "host_bytes": plan.host_bytes,
    }
    return Source(
        _text(program, params, tables, plan),
        emitter.constants,
        emitter.kernels,
        emitter.collectives,
        memory,
        sum(1 for _ in walk(items)),
        sorted(emitter.groups),
        emitter.operations,
        sorted(emitter.host_arguments),
    )
