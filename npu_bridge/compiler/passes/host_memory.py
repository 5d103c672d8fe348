"""Memory of each value: the device's or the host's.

JAX says where a value moves (`jax.device_put` to a memory space, offload policies, memory kinds of arguments and
results), as operations ``place``. What a scan stacks of such values, and what loops and branches hand on, lies in host
memory too: it follows from the operations. `place_values` marks every value (`Value.host`), adds the copies that are
missing (the array of zeros that a scan stacks residuals in), and turns an update of an array in host memory into
``host_update``, one copy from the device to its place.
"""

from __future__ import annotations

from npu_bridge.compiler.ir import Block, Op, Program, Value, substitute
from npu_bridge.errors import UnsupportedError

# What may be done to an array in host memory: the result is a view of it.
_VIEWS = frozenset({"reshape", "broadcast_in_dim", "slice", "dynamic_slice", "relabel"})


def place_values(program: Program, device: str) -> None:
    """Mark all values and complete the copies, in place. Raises UnsupportedError for computation in host memory."""
    places = any(op.name == "place" for op in program.body.walk())
    if not (places or any(program.host_arguments) or any(program.host_results)):
        return
    for value, host in zip(program.body.params, program.host_arguments):
        value.host = host
    while _mark(program.body):
        pass
    placing = _Placing(device)
    placing.block(program.body)
    wanted = [v.host if host is None else host for v, host in zip(program.body.results, program.host_results)]
    program.body.results = placing.results(program.body, wanted)
    substitute(program.body, placing.same)
    if placing.problems:
        raise UnsupportedError(list(dict.fromkeys(placing.problems)))


def _is_view(op: Op) -> bool:
    return op.name in _VIEWS and (op.name != "broadcast_in_dim" or op.result.type.size == op.operands[0].type.size)


def _mark(block: Block) -> bool:
    """Mark values that follow from marked ones. Returns whether one was new."""
    new = False

    def mark(value: Value, host: bool) -> None:
        nonlocal new
        if host and not value.host:
            value.host = new = True

    for op in block.ops:
        if op.name == "place":
            mark(op.result, op.attrs["memory"] == "host")
        elif op.name == "optimization_barrier":
            for operand, result in zip(op.operands, op.results):
                mark(result, operand.host)
        elif _is_view(op):
            mark(op.result, op.operands[0].host)
        elif op.name == "dynamic_update_slice":
            mark(op.result, op.operands[0].host or op.operands[1].host)
        elif op.name == "while":
            condition, body = op.regions
            for at in zip(op.operands, condition.params, body.params, body.results, op.results):
                host = any(v.host for v in at)
                for value in (at[1], at[2], at[4]):
                    mark(value, host)
        elif op.name == "case":
            for n, result in enumerate(op.results):
                mark(result, any(region.results[n].host for region in op.regions))
        for region in op.regions:
            new |= _mark(region)
    return new


class _Placing:
    def __init__(self, device: str):
        self.device = device
        self.problems: list[str] = []
        self.same: dict[Value, Value] = {}  # placed where it is already
        self.kept: list[Op] = []

    def block(self, block: Block) -> None:
        outer, self.kept = self.kept, []
        for op in block.ops:
            self._op(op)
        block.ops, self.kept = self.kept, outer

    def results(self, block: Block, wanted: list[bool]) -> list[Value]:
        outer, self.kept = self.kept, block.ops
        at = block.ops[-1] if block.ops else Op("place", [], [])
        made = [self._on(v, host, at) for v, host in zip(block.results, wanted)]
        self.kept = outer
        return made

    def _on(self, value: Value, host: bool, at: Op) -> Value:
        """Return the value in the wanted memory, behind a copy if it lies in the other."""
        if value.host == host:
            return value
        placed = Value(value.type, value.layout, host=host)
        self.kept.append(Op("place", [value], [placed], {"memory": "host" if host else "device"}, location=at.location))
        return placed

    def _op(self, op: Op) -> None:
        if op.name == "place" and op.operands[0].host == op.result.host:
            self.same[op.result] = op.operands[0]
            return
        if op.name == "while":
            op.operands = [self._on(v, p.host, op) for v, p in zip(op.operands, op.regions[1].params)]
        elif op.name == "dynamic_update_slice" and op.result.host:
            stack, update, *starts = op.operands
            op.name = "host_update"
            op.operands = [self._on(stack, True, op), self._from_device(update, op), *starts]
        elif op.name not in ("place", "optimization_barrier", "case") and not _is_view(op):
            self._computes(op)
        for region in op.regions:
            self.block(region)
        if op.name == "while":
            body = op.regions[1]
            body.results = self.results(body, [p.host for p in body.params])
        elif op.name == "case":
            for region in op.regions:
                region.results = self.results(region, [r.host for r in op.results])
        self.kept.append(op)

    def _computes(self, op: Op) -> None:
        if not any(v.host for v in op.operands):
            return
        if self.device != "cpu":
            self.problems.append(
                f"{op.name} at {op.location}: reads a value in host memory, where nothing is computed on "
                f"{self.device}; jax.device_put it to jax.memory.Space.Device first"
            )
        op.operands = [self._on(v, False, op) for v in op.operands]

    def _from_device(self, value: Value, at: Op) -> Value:
        """Return the value on the device that an update in host memory was copied from, with its views."""
        views, source = [], value
        while source.host and source.producer is not None and source.producer.name in ("reshape", "broadcast_in_dim"):
            views.append(source.producer)
            source = source.producer.operands[0]
        if not source.host or source.producer is None or source.producer.name != "place":
            return self._on(value, False, at)
        source = source.producer.operands[0]
        if source.host:
            return self._on(value, False, at)
        for view in reversed(views):
            again = Op(view.name, [source], [Value(view.result.type, view.result.layout)], dict(view.attrs),
                       location=view.location)  # fmt: skip
            self.kept.append(again)
            source = again.result
        return source
