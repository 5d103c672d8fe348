"""Walk the intermediate form and write torch statements. Registered modules define each operation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from npu_bridge.compiler.codegen.operands import (
    BIT_UNSIGNED,
    BITS,
    HostInt,
    HostTable,
    Literal,
    Operand,
    Tensor,
    literal_code,
    torch_dtype,
)
from npu_bridge.compiler.codegen.program import Assign, Exchange, Function, Item, Stmt
from npu_bridge.compiler.ir import Block, Location, MeshShape, Op, Program, Type, Value, free_values
from npu_bridge.errors import UnsupportedError

Lowering = Callable[["Emitter", Op, list[Operand]], list[Operand] | Operand]
LOWERINGS: dict[str, Lowering] = {}
# Operations that keep a table of the host on the host; others get it as a tensor.
TAKES_TABLES = frozenset(
    {
        "slice",
        "dynamic_slice",
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "convert",
        "dynamic_update_slice",
        "while",
        "case",
        "optimization_barrier",
        "relabel",
    }
)
LARGEST_TABLE = 4096  # largest constant that the host looks up; larger ones stay on the device
LONGEST_CODE = 40  # longest code of a host integer that is inlined; longer ones become variables


def lowering(*names: str) -> Callable[[Lowering], Lowering]:
    """Register the writer of operations with these names. A name may be registered once."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            if name in LOWERINGS:
                raise ValueError(f"operation {name!r} has two lowerings")
            LOWERINGS[name] = function
        return function

    return register


@dataclasses.dataclass(frozen=True)
class LoopState:
    """A counted loop that is being written: its counter's code, step and last value; variables that it carries."""

    counter: str
    step: int
    last: int
    carried: frozenset[str]


class Emitter:
    """State of one program being written."""

    def __init__(self, program: Program, *, allow_host_sync: bool = False, device: str = "cpu"):
        self.program = program
        self.device = device
        self.mesh: MeshShape = program.mesh
        self.allow_host_sync = allow_host_sync
        self.items: list[Item] = []
        self.env: dict[Value, Operand] = {}
        self.constants: list[tuple] = []  # (numpy array of the whole value, axes of each dimension)
        self.kernels: list[dict] = []
        self.collectives: list[dict] = []
        self.groups: set[tuple[str, ...]] = set()  # axes over which one call exchanges
        self.problems: list[str] = []
        self.operations: dict[str, int] = {}  # how often each operation was written
        self.arguments: dict[str, int] = {}  # the program's own arguments, by name
        self.host_arguments: set[int] = set()  # those of which kernels read the host's copy
        self.location = Location()
        self.tables: dict[tuple, str] = {}  # elements of tables that the host looks up, and their names in the text
        self.loops: list[LoopState] = []  # counted loops around the code that is being written
        self._count = 0
        self._exchange: Exchange | None = None  # noted, for the statement that is written next
        self._trips = 1  # how often the code being written runs in one step
        self._constant_index: dict[bytes, int] = {}

    # -- program ----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[list[str], list[str]]:
        """Write everything; return the names of parameters and results. Raises UnsupportedError with all problems."""
        body = self.program.body
        params = []
        for i, p in enumerate(body.params):
            params.append(f"a{i}")
            self.arguments[f"a{i}"] = i
            self.env[p] = Tensor(params[-1], p.type)
        self.block(body)
        results = [self.tensor(self.env[r]).name for r in body.results]
        if self.problems:
            raise UnsupportedError(list(dict.fromkeys(self.problems)))
        return params, results

    def block(self, block: Block) -> None:
        for op in block.ops:
            self.location = op.location
            self.operations[op.name] = self.operations.get(op.name, 0) + 1
            write = LOWERINGS.get(op.name)
            if write is None:
                self.problem(op, "the bridge has no lowering for this operation")
                outs: list[Operand] = [Literal(0, r.type) for r in op.results]
            else:
                args = [self.env[v] for v in op.operands]
                if op.name not in TAKES_TABLES:
                    args = [self.tensor(a) if isinstance(a, HostTable) else a for a in args]
                made = write(self, op, args)
                outs = made if isinstance(made, list) else [made]
            for result, operand in zip(op.results, outs, strict=True):
                if operand.type != result.type:
                    self.problem(op, f"its operands make {operand.type} on one device, its sharding says {result.type}")
                self.env[result] = operand

    def problem(self, op: Op, text: str) -> None:
        self.problems.append(f"{op.name} at {op.location}: {text}")

    # -- writing ----------------------------------------------------------------------------------------------------

    def fresh(self, prefix: str = "v") -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def emit(
        self,
        code: str,
        ins: Iterable[Operand],
        type: Type,
        *,
        alias: Tensor | None = None,
        expands: bool = False,
        inplace: Sequence[tuple[Tensor, str]] = (),
        kind: str = "",
        constant: bool = False,
    ) -> Tensor:
        """Write one statement with one result."""
        out = Tensor(self.fresh(), type)
        names = [i.name for i in ins if isinstance(i, Tensor)]
        begun, self._exchange = self._exchange, None
        options = [((t.name,), c) for t, c in inplace]
        self.items.append(
            Stmt(
                [out.name],
                code,
                names,
                [type],
                alias.name if alias else None,
                expands,
                options,
                self.location,
                kind,
                constant,
                exchange=begun,
            )
        )
        return out

    def emit_many(
        self,
        code: str,
        ins: Iterable[Operand],
        types: Sequence[Type],
        *,
        inplace: tuple[tuple[str, ...], str] | None = None,
        kind: str = "",
    ) -> list[Tensor]:
        """Write one statement with several results (a tuple is unpacked)."""
        outs = [Tensor(self.fresh(), t) for t in types]
        names = [i.name for i in ins if isinstance(i, Tensor)]
        self.items.append(
            Stmt(
                [o.name for o in outs],
                code,
                names,
                list(types),
                inplace=[inplace] if inplace else [],
                location=self.location,
                kind=kind,
            )
        )
        return outs

    def tensor(self, operand: Operand) -> Tensor:
        """Return the operand as a torch variable."""
        if isinstance(operand, Tensor):
            return operand
        shape, dtype = operand.type.shape, torch_dtype(operand.type.dtype)
        if isinstance(operand, HostTable):
            return self._table(operand)
        if isinstance(operand, HostInt) and shape:
            one = self.tensor(dataclasses.replace(operand, type=Type((), operand.type.dtype)))
            return self.emit(f"{one.name}.expand({shape})", [one], operand.type, alias=one, expands=True, kind="fill")
        if isinstance(operand, HostInt):
            value = f"int({operand.code})" if operand.type.dtype != "i1" else f"bool({operand.code})"
            if operand.type.dtype in BIT_UNSIGNED:
                value = f"rt.wrap({operand.code}, {BITS[operand.type.dtype]}, False)"  # stored as signed bits
            return self.emit(
                f"torch.full({shape}, {value}, dtype={dtype}, device=rt.device)", [], operand.type, kind="fill"
            )
        value = literal_code(operand.value, operand.type.dtype)
        zero = operand.value == 0 and not isinstance(operand.value, complex) and math.copysign(1, operand.value) > 0
        fill = f"torch.zeros({shape}, " if zero else f"torch.full({shape}, {value}, "
        if dtype.startswith("torch.float8"):
            return self.emit(f"{fill}dtype=torch.float32, device=rt.device).to({dtype})", [], operand.type, kind="fill")
        return self.emit(f"{fill}dtype={dtype}, device=rt.device)", [], operand.type, kind="fill")

    def _table(self, table: HostTable) -> Tensor:
        """Return a host table as a tensor: a view of the constant on the device."""
        whole = self.emit(table.device, [], Type(table.whole, table.type.dtype), kind="constant", constant=True)
        if table.offset == "0" and table.type.shape == table.whole:
            return whole
        code = f"{whole.name}.as_strided({table.type.shape}, {table.strides}, {table.offset})"
        return self.emit(code, [whole], table.type, alias=whole, expands=0 in table.strides, kind="constant")

    def host_table(self, array, dtype: str) -> HostTable:
        """Return a constant array of integers or booleans as a host table."""
        values = tuple(int(v) for v in array.reshape(-1).tolist())
        name = self.tables.setdefault((values, dtype == "i1"), f"TABLE{len(self.tables)}")
        strides = tuple(math.prod(array.shape[d + 1 :]) for d in range(array.ndim))
        device = self.constant(array, [()] * array.ndim)
        return HostTable(name, Type(array.shape, dtype), "0", strides, device, array.shape, min(values), max(values))

    def host_variable(self, name: str, type: Type, low: int | None = None, high: int | None = None) -> HostTable:
        """Return a host table held as a flat tuple in a Python variable."""
        strides = tuple(math.prod(type.shape[d + 1 :]) for d in range(len(type.shape)))
        device = (
            f"rt.host_tensor({name}, {type.shape}, "
            f"{torch_dtype(type.dtype)}{', True' if type.dtype in BIT_UNSIGNED else ''})"
        )
        return HostTable(name, type, "0", strides, device, type.shape, low, high)

    def host(self, value: HostInt) -> HostInt:
        """Bind a host integer with long code to a name, so that later code does not repeat it."""
        if len(value.code) <= LONGEST_CODE:
            return value
        name = self.fresh("h")
        self.items.append(Assign([name], [value.code]))
        return dataclasses.replace(value, code=name)

    def text(self, operand: Operand) -> str:
        """Return the operand as code: a name, a number, or a bracketed expression."""
        if isinstance(operand, Tensor):
            return operand.name
        if isinstance(operand, HostInt):
            return f"({operand.code})"
        code = literal_code(operand.value, operand.type.dtype)
        return f"({code})" if code.startswith("-") else code

    def host_argument(self, name: str) -> str:
        """Return code for the host copy of an argument, for kernels that read numbers on the host without
        synchronising.
        """
        self.host_arguments.add(self.arguments[name])
        return f"rt.host[{self.arguments[name]}]"

    def constant(self, array, dims: Sequence[Sequence[str]]) -> str:
        """Return code for a constant array, which is put on the device once at load time."""
        dims = [tuple(d) for d in dims]
        key = array.tobytes() + str((array.shape, array.dtype, dims)).encode()
        if key not in self._constant_index:
            self._constant_index[key] = len(self.constants)
            self.constants.append((array, dims))
        return f"K[{self._constant_index[key]}]"

    @contextlib.contextmanager
    def nested(self, trips: int = 1):
        """Collect the statements written inside into a new list."""
        outer, self.items = self.items, []
        self._trips *= trips
        try:
            yield self.items
        finally:
            self.items = outer
            self._trips //= trips

    def save(self) -> tuple:
        """Snapshot the emitter's state for `restore`."""
        return (
            len(self.items),
            dict(self.env),
            len(self.constants),
            len(self.kernels),
            len(self.collectives),
            set(self.groups),
            len(self.problems),
            dict(self.operations),
            set(self.host_arguments),
            dict(self._constant_index),
            dict(self.tables),
        )

    def restore(self, state: tuple) -> None:
        """Undo everything written since `save`."""
        (
            items,
            self.env,
            constants,
            kernels,
            collectives,
            self.groups,
            problems,
            self.operations,
            self.host_arguments,
            self._constant_index,
            self.tables,
        ) = state
        for written, length in (
            (self.items, items),
            (self.constants, constants),
            (self.kernels, kernels),
            (self.collectives, collectives),
            (self.problems, problems),
        ):
            del written[length:]

    @contextlib.contextmanager
    def into(self, items: list[Item]):
        """Append the statements written inside to an existing list."""
        outer, self.items = self.items, items
        try:
            yield
        finally:
            self.items = outer

    def function(self, op: Op, block: Block, prefix: str) -> str | None:
        """Write a region on scalars as a function on tensors of any one shape; return its name.

        Element-wise code does not mention shapes, so the same text serves a whole array at once.
        """
        outer_env = dict(self.env)
        for v in free_values(block):
            if not isinstance(self.env.get(v), Literal):
                self.problem(op, "its body reads a value from outside; pass it as an operand")
                return None
        name = self.fresh(prefix)
        params = []
        for p in block.params:
            params.append(self.fresh("p"))
            self.env[p] = Tensor(params[-1], p.type)
        with self.nested() as items:
            self.block(block)
            results = [self.tensor(self.env[r]).name for r in block.results]
        self.env = outer_env
        items = [i for i in items if not isinstance(i, Assign)]
        lines = [f"{', '.join(s.outs)} = {s.code}" for s in items if isinstance(s, Stmt)]
        if len(lines) != len(items):
            self.problem(op, "its body holds a loop")
            return None
        within = set(params)  # results that alias a parameter
        for s in items:
            if isinstance(s, Stmt) and s.alias in within:
                within.add(s.outs[0])
        # Clone results that alias parameters: the caller's results must own their storage, and operands may be views.
        results = [f"{r}.clone()" if r in within else r for r in results]
        self.items.append(Function(name, params, lines, results))
        return name

    def note_collective(
        self,
        op: Op,
        kind: str,
        dims: Sequence[Sequence[str]],
        type: Type,
        moved: int,
        *,
        waits: bool = True,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Record a collective: `moved` bytes leave this device per execution. dims: axes of each call. waits: whether
        it blocks the computation or overlaps with it until its result is read.
        """
        self.groups.update(tuple(d) for d in dims if d)
        self._exchange = Exchange(kind, tuple(tuple(d) for d in dims if d), tuple(pairs))
        axes = tuple(a for d in dims for a in d)
        self.collectives.append(
            {"kind": kind, "axes": axes, "devices": self.mesh.size(axes), "shape": type.shape, "dtype": type.dtype,
             "bytes": moved, "times": self._trips, "waits": waits, "location": str(op.location)}
        )  # fmt: skip
