"""Map each operation of a compiled program to a block of the model, from the program's text."""

from __future__ import annotations

import collections
import re

from mindvl_jax.profiling.blocks import COLLECTIVES, OTHER, block_of

# "%name = type opcode(%operand, ...), calls=%computation,
# metadata={op_name="jit(f)/jvp(vision)/blocks/attention/dot_general"}"
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\([^=]*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<operands>[^)]*)\)"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


SPANS = "(spans others)"
"""In the place of a block: the time of such an operation is the time of others, which the trace tells as well."""


def blocks_of_program(text: str) -> dict[str, str]:
    """Return instruction name -> block for an optimised program (`compiled.as_text()`).

    Instructions added by the compiler carry no scope: they get the most frequent block inside them, or that of their
    operands.
    """
    opcode: dict[str, str] = {}
    path: dict[str, str] = {}
    calls: dict[str, str] = {}
    operands: dict[str, list[str]] = {}
    inside: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    computation = ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            computation = start["name"]
            continue
        if (found := _INSTRUCTION.match(line)) is None:
            continue
        name = found["name"]
        opcode[name] = found["opcode"]
        operands[name] = re.findall(r"%([\w.\-]+)", found["operands"])
        if (op_name := _OP_NAME.search(line)) is not None and op_name[1]:
            path[name] = op_name[1]
            inside[computation][block_of(op_name[1])] += 1
        if (called := _CALLS.search(line)) is not None:
            calls[name] = called[1]

    def resolve(name: str, depth: int = 0) -> str:
        if opcode.get(name, "").startswith(_COLLECTIVES):
            return COLLECTIVES
        block = block_of(path.get(name, ""))
        if block == OTHER and (within := inside.get(calls.get(name, ""))):
            block = next((candidate for candidate, _ in within.most_common() if candidate != OTHER), OTHER)
        if block == OTHER and depth < 4:
            block = next(
                (source for operand in operands.get(name, ()) if (source := resolve(operand, depth + 1)) != OTHER),
                OTHER,
            )
        return block

    # The event of a loop spans the events of its body.
    return {name: SPANS if opcode[name] in ("while", "conditional") else resolve(name) for name in opcode}
