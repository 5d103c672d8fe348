"""The text of a program that XLA compiled, for reading: what runs how often, how many numbers it multiplies, how many
bytes it moves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from mindvl_jax.parallel.exchanges import KINDS
from mindvl_jax.profiling.hlo import blocks_of_program

ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program; `rest` is the text from its operands on."""

    name: str
    result: str
    opcode: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest[_closing(self.rest) :])
        return found[1] if found else None

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Program:
    """The text of a compiled program, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))
        self.blocks = blocks_of_program(text)
        self._named = {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def walk(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Yield (computation, instruction, how often a step runs it) of what is scheduled one by one."""
        computation = computation or self.entry
        for one in self.computations[computation]:
            if one.opcode == "while":
                yield from self.walk(one.attribute("body"), times * self.rounds(one))
            elif one.opcode == "conditional":  # the branch with the most in it
                branches = re.findall(r"(?:_computation=|branch_computations=\{|, )%([\w.-]+)", one.rest)
                known = [name for name in branches if name in self.computations]
                yield from self.walk(max(known, key=lambda name: len(self.computations[name])), times)
            elif one.opcode == "call":
                yield from self.walk(one.attribute("to_apply"), times)
            else:
                yield computation, one, times

    def rounds(self, loop: Instruction) -> int:
        """Trip count of a loop: the compiler's, or the bound that its counter is compared with; else 1."""
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(said[1])
        condition = self.computations.get(loop.attribute("condition"), [])
        bounds = [
            int(found[1]) for one in condition if one.opcode == "constant" and (found := re.match(r"(\d+)\)", one.rest))
        ]
        return bounds[0] if len(bounds) == 1 and "direction=LT" in str([one.rest for one in condition]) else 1

    def flops(self, computation: str, one: Instruction) -> float:
        """Of products in an instruction and in what it calls."""
        if one.opcode in ("dot", "convolution"):
            left, right = (self._shape(computation, name) for name in one.operands[:2])
            result = _dims(ARRAY.search(one.result)[2])
            if one.opcode == "convolution":
                return 2 * _convolution_products(one.rest, left, right, result)
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
            return 2 * math.prod(result) * math.prod(left[int(d)] for d in (dims[1] if dims else "").split(",") if d)
        called = one.attribute("calls")
        if one.opcode != "fusion" or called not in self.computations:
            return 0
        return sum(self.flops(called, inner) for inner in self.computations[called])

    def _shape(self, computation: str, name: str) -> tuple[int, ...]:
        found = ARRAY.search(self._named[computation][name].result)
        return _dims(found[2]) if found else ()

    def bytes(self, computation: str, one: Instruction) -> float:
        """That an instruction reads and writes; of an operand that is only sliced inside a fusion, the slices."""
        called = self.computations.get(one.attribute("calls") or "", [])
        sliced = _sliced(called)
        written = sum(map(byte_count, ARRAY.findall(one.result)))
        read = 0.0
        for number, name in enumerate(one.operands):
            if number in sliced:
                read += sliced[number]
            elif name in self._named[computation]:
                read += sum(map(byte_count, ARRAY.findall(self._named[computation][name].result)))
        if one.opcode in ("dynamic-slice", "gather"):
            read = written
        if one.opcode in ("dynamic-update-slice", "scatter") or any(
            inner.opcode == "dynamic-update-slice" and inner.result == one.result for inner in called
        ):
            read, written = min(read, written), 0  # in place: the rest of the array stays where it is
        return read + written

    def exchange_of(self, one: Instruction) -> str | None:
        """Kind of exchange of an instruction or of what it wraps; None for anything else."""
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            return kind
        for inner in self.computations.get(one.attribute("calls") or "", []):
            if inner.opcode.removesuffix("-start") in KINDS:
                return (
                    "reduce-scatter"
                    if (one.attribute("calls") or "").startswith("all-reduce-scatter")
                    else inner.opcode
                )
        return None


def _convolution_products(rest: str, left: tuple, right: tuple, result: tuple) -> int:
    """Numbers that are multiplied. A TPU writes every product as a convolution, and a batch dim of a product as a
    window that slides over padding: positions outside of the array do not count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    window = dict(re.findall(r"(\w+)=([\w-]+)", (re.search(r"window=\{([^}]*)\}", rest) or ["", ""])[1]))
    of_result, of_right = dict(zip(labels[3], result, strict=True)), dict(zip(labels[2], right, strict=True))
    of_left = dict(zip(labels[1], left, strict=True))
    count = of_result["b"] * of_result["f"] * of_right["i"]
    for dim in sorted(set(labels[3]) - {"b", "f"}):

        def setting(name, default, dim=dim):
            return window[name].split("x")[int(dim)] if name in window else default

        stride, holes, spread = (int(setting(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(setting("pad", "0_0").split("_")[0])
        places = [o * stride + w * spread - before for o in range(of_result[dim]) for w in range(of_right[dim])]
        count *= sum(place % holes == 0 and 0 <= place // holes < of_left[dim] for place in places)
    return count


def _closing(text: str) -> int:
    """Return the index at which the bracket open at the start of `text` closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def _size(array: tuple[str, str]) -> int:
    return math.prod(_dims(array[1]))


def byte_count(array: tuple[str, str]) -> float:
    width = _BYTES.get(array[0]) or int(re.search(r"\d+", array[0])[0]) / 8
    return _size(array) * width


def _sliced(called: list[Instruction]) -> dict[int, float]:
    """Bytes read of each parameter of a fused computation that nothing but dynamic slices read, by its number."""
    found = {}
    for one in called:
        if one.opcode != "parameter":
            continue
        readers = [inner for inner in called if one.name in inner.operands]
        if readers and all(inner.opcode == "dynamic-slice" and inner.operands[0] == one.name for inner in readers):
            number = int(one.rest.split(")")[0])
            found[number] = sum(sum(map(byte_count, ARRAY.findall(inner.result))) for inner in readers)
    return found
