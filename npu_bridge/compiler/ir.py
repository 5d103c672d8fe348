"""The bridge's intermediate form: typed SSA over local (per-device) arrays.

The importer builds it from partitioned StableHLO: calls are inlined, attributes are plain Python values, shapes are
*local*, and communication is explicit. Passes rewrite it, the code generator prints it.

Operation names are StableHLO's without prefix (``add``, ``dot_general``). Collectives and kernels have names of their
own:

=================== ================================================================================================
``all_reduce``       attrs ``axes``, ``kind`` ("add", "maximum", ...)
``all_gather``       attrs ``dims``: for each dimension the axes over which its shards are gathered
``all_slice``        attrs ``dims``: for each dimension the axes over which this device keeps its shard (no exchange)
``reduce_scatter``   attrs ``dims``, ``kind``, and ``axes`` in the order of the dims
``start_all_gather``, ``start_reduce_scatter``, ``start_permute``, ``start_all_to_all``: the same attrs; the result is
an exchange in flight, for ``wait``
``wait``             attrs ``of`` (the exchange's name) and ``dims``; operands: what was started, and what it was given
``all_to_all``       attrs ``axes``, ``source``, ``target``: the sharding moves from dimension source to target
``ragged_all_to_all`` attrs ``axes``; operands: rows, output, input offsets, sizes, output offsets, sizes received
``permute``          attrs ``pairs``: (source, target) devices; a device that receives nothing gets zeros
``partition_id``     number of this device in the mesh
``pick``             element of each row of operand 0 (last dimension) at index operand 1; attrs ``axes`` of the split
``add_at``           attrs ``number``, added to that element; ``axes``
``place``            attrs ``memory``: a copy to the memory of the "host" or the "device"
``host_update``      a dynamic_update_slice of an array in the host's memory by one on the device
``kernel``           attrs ``name``, ``params``: a fused operator
=================== ================================================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

# Bytes per element, by MLIR type name.
ELEMENT_BYTES = {
    "i1": 1, "i8": 1, "ui8": 1, "i16": 2, "ui16": 2, "i32": 4, "ui32": 4, "i64": 8, "ui64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8E4M3FN": 1, "f8E5M2": 1, "f8E4M3FNUZ": 1, "f8E5M2FNUZ": 1,
    "complex<f32>": 8, "complex<f64>": 16,
}  # fmt: skip
FLOATS = frozenset(t for t in ELEMENT_BYTES if "f" in t)  # complex numbers included
COMPLEX = frozenset(t for t in ELEMENT_BYTES if t.startswith("complex"))
FLOAT8 = frozenset(t for t in ELEMENT_BYTES if t.startswith("f8"))
UNSIGNED = frozenset(t for t in ELEMENT_BYTES if t.startswith("ui"))


@dataclasses.dataclass(frozen=True)
class Type:
    """Local shape and element type (MLIR's name: ``f32``, ``bf16``, ``i32``, ``ui32``, ``i1``, ...)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * ELEMENT_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Location:
    """Source of an operation: its named_scope path and the user's file and line."""

    scope: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown line"
        return f"{place} ({self.scope})" if self.scope else place


Layout = tuple[tuple[str, ...], ...]  # for each dimension the mesh axes it is split over, major first


@dataclasses.dataclass(eq=False)
class Value:
    """One SSA value. Equality is identity."""

    type: Type
    layout: Layout = ()
    producer: Op | None = None
    host: bool = False  # lies in the host's memory (passes/host_memory.py)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype


@dataclasses.dataclass(eq=False)
class Op:
    name: str
    operands: list[Value]
    results: list[Value]
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    regions: list[Block] = dataclasses.field(default_factory=list)
    location: Location = Location()

    def __post_init__(self) -> None:
        for r in self.results:
            r.producer = self

    @property
    def result(self) -> Value:
        return self.results[0]


@dataclasses.dataclass(eq=False)
class Block:
    params: list[Value]
    ops: list[Op] = dataclasses.field(default_factory=list)
    results: list[Value] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Op]:
        """Yield all operations; inner regions follow their operation."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Axis names and sizes, and the rank at each mesh position (row-major)."""

    axes: tuple[tuple[str, int], ...] = ()
    devices: tuple[int, ...] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    @property
    def count(self) -> int:
        return math.prod(n for _, n in self.axes)

    def size(self, axes: tuple[str, ...]) -> int:
        """Return the number of shards of these axis references (``x`` or a sub-axis ``x:before:size``)."""
        return math.prod(axis_parts(a, self.sizes)[2] for a in axes)


def axis_parts(reference: str, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """``x`` -> (x, 1, size of x); the sub-axis ``x:before:size`` -> (x, before, size)."""
    name, _, rest = reference.partition(":")
    if not rest:
        return name, 1, sizes[name]
    before, size = rest.split(":")
    return name, int(before), int(size)


@dataclasses.dataclass
class Program:
    """A step on one device. `donated[i]`: argument i's storage may be overwritten.

    host_arguments, host_results: whether each lies in the host's memory; None: where it was computed.
    """

    mesh: MeshShape
    body: Block
    donated: list[bool]
    name: str = "main"
    host_arguments: list[bool] = dataclasses.field(default_factory=list)
    host_results: list[bool | None] = dataclasses.field(default_factory=list)


def body_kind(block: Block) -> str | None:
    """``add``, ``maximum``, ... when a reduction body is one binary operation of its two parameters; ``replace`` when
    it returns the second; None for anything else.
    """
    if len(block.params) != 2 or len(block.results) != 1:
        return None
    if not block.ops:
        return "replace" if block.results[0] is block.params[1] else None
    if len(block.ops) == 1 and block.results[0] is block.ops[0].results[0]:
        op = block.ops[0]
        if len(op.operands) == 2 and {id(v) for v in op.operands} == {id(v) for v in block.params}:
            return op.name
    return None


def calls_back(op: Op) -> bool:
    """Whether an operation, or one in its regions, calls a Python function of the host."""
    return op.name == "callback" or any(calls_back(o) for r in op.regions for o in r.ops)


def has_effect(op: Op) -> bool:
    """Whether an operation has side effects: a Python callback, itself or in a region."""
    return bool(op.name == "callback" and op.attrs["effect"]) or any(has_effect(o) for r in op.regions for o in r.ops)


def substitute(block: Block, replacement: Mapping[Value, Value]) -> None:
    """Replace values wherever they are read, inner regions included. Chains (a -> b -> c) are followed."""
    if not replacement:
        return

    def final(v: Value) -> Value:
        while v in replacement:
            v = replacement[v]
        return v

    def visit(b: Block) -> None:
        for op in b.ops:
            op.operands = [final(v) for v in op.operands]
            for r in op.regions:
                visit(r)
        b.results = [final(v) for v in b.results]

    visit(block)


def free_values(block: Block) -> list[Value]:
    """Return the free values of a region, in order of first use."""
    defined: set[int] = {id(p) for p in block.params}
    found: dict[int, Value] = {}

    def read(v: Value) -> None:
        if id(v) not in defined:
            found.setdefault(id(v), v)

    for op in block.ops:
        for v in op.operands:
            read(v)
        for region in op.regions:
            for v in free_values(region):
                read(v)
        defined.update(id(r) for r in op.results)
    for v in block.results:
        read(v)
    return list(found.values())


def dump(block: Block, indent: int = 0) -> str:
    """Print the form as text, for tests and debugging."""
    names: dict[int, str] = {}

    def name(v: Value) -> str:
        return names.setdefault(id(v), f"%{len(names)}")

    lines: list[str] = []

    def visit(b: Block, pad: str) -> None:
        lines.append(f"{pad}({', '.join(f'{name(p)}: {p.type}' for p in b.params)})")
        for op in b.ops:
            attrs = " ".join(f"{k}={v!r}" for k, v in op.attrs.items() if not hasattr(v, "shape"))
            outs = ", ".join(f"{name(r)}: {r.type}" for r in op.results)
            lines.append(f"{pad}{outs} = {op.name}({', '.join(map(name, op.operands))}) {attrs}".rstrip())
            for region in op.regions:
                visit(region, pad + "    ")
        lines.append(f"{pad}return {', '.join(map(name, b.results))}")

    visit(block, "  " * indent)
    return "\n".join(lines)
