"""Pipeline executor: runs a schedule's table over the `stage` axis of the mesh.

Each device of the axis holds the same number of a decoder's layers. The rows of its group are cut into micro-batches,
which walk through the stages: activations go up, gradients come down, one permute of each kind a tick at most. The
table says what a device does in a tick; a device runs its own branch alone. With several chunks a device (the
interleaved schedule) chunk c of device d holds layers that lie elsewhere in the natural order, which parameters and
checkpoints keep: they change places once before the first tick, and their gradients once after the last.

Loss and gradients are made in one pass, because a schedule such as 1F1B runs backward passes between forward passes.
That works where the loss is linear in the losses of the tokens with weights that are known beforehand, as every
reduction of `objectives.sft` is. A backward pass recomputes its chunk from the input that the device kept.

Collectives, whatever the number of micro-batches: parameters are gathered over fsdp once, their gradients scattered
once, and summed over the other row axes once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mindvl_jax.config.schema import ParallelConfig
from mindvl_jax.parallel import pipeline_schedules as schedules
from mindvl_jax.parallel.activations import Placement, current
from mindvl_jax.parallel.mesh import FSDP, ROW_AXES
from mindvl_jax.parallel.pipeline_schedules import Op, Schedule
from mindvl_jax.parallel.rules import partition_spec

AXIS = "stage"
IDLE, FORWARD, LOSSES, BACKWARD, BACKWARD_LAST, WEIGHTS, WEIGHTS_LAST = range(7)
"""What a device does in a tick. LAST: of the last chunk, which makes the losses too. LOSSES is its forward pass where
no backward pass follows; else that has nothing to do."""

Fields = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of the pipeline.

    Attributes:
      leaves: arrays. names: logical dims of each, as parameters carry them.
    """

    leaves: Sequence[jax.Array]
    names: Sequence[Sequence[str | None] | None]


@dataclasses.dataclass(frozen=True)
class Table:
    """A schedule in ticks of equal length, at the end of which every device may receive from its neighbours.

    All arrays are (ticks, stages) int32 but `up` and `down`, which are (ticks,) bool: whether anything moves.

    Attributes:
      kind: IDLE, FORWARD, .. micro_batch, chunk: of that work.
      reads, pulls: slot of its input, slot of the gradient of its output.
      first: 1 where the input is that of the pipeline.
      takes, gets: slot into which the input or gradient is written that arrives at the end of the tick; the one behind
        the last where none does.
      slots, gradient_slots: how many a device needs.
    """

    kind: np.ndarray
    micro_batch: np.ndarray
    chunk: np.ndarray
    first: np.ndarray
    reads: np.ndarray
    pulls: np.ndarray
    takes: np.ndarray
    gets: np.ndarray
    up: np.ndarray
    down: np.ndarray
    slots: int
    gradient_slots: int


def is_installed() -> bool:
    """Whether the step being traced has pipeline stages."""
    placement = current()
    return placement is not None and placement.mesh.shape[AXIS] > 1


def schedule_of(parallel: ParallelConfig, stages: int, micro_batches: int) -> Schedule:
    """The schedule that a configuration names.

    Raises:
      UserError: the micro-batches do not suit it.
    """
    if parallel.pipeline_schedule == "interleaved":
        return schedules.interleaved(stages, parallel.pipeline_chunks, micro_batches)
    make = {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b, "zero_bubble": schedules.zero_bubble}
    return make[parallel.pipeline_schedule](stages, micro_batches)


def table_of(schedule: Schedule) -> Table:
    """Cut a schedule into ticks, and give every input and gradient a slot while it is needed."""
    S, v = schedule.stages, schedule.chunks
    times = dict.fromkeys("FBW", float(v))  # of all chunks of a device: a chunk takes one tick
    spans = schedules.simulate(schedule, times).spans
    ticks = round(max(end for own in spans for _, _, end in own))
    when = [{op: round(begin) for op, begin, _ in own} for own in spans]
    trains = any(op.kind == "B" for op in when[0])
    reader = "W" if schedule.splits_weights else "B" if trains else "F"  # the work that reads what is kept last
    names = ("kind", "micro_batch", "chunk", "first", "reads", "pulls")
    arrays = {name: np.zeros((ticks, S), np.int32) for name in names}
    inputs: list[dict[Op, tuple[int, int]]] = [{} for _ in range(S)]  # ticks of arrival and of the last read
    gradients: list[dict[Op, tuple[int, int]]] = [{} for _ in range(S)]
    for device in range(S):
        for op, tick in when[device].items():
            number = op.chunk * S + device
            last = number == S * v - 1
            arrays["micro_batch"][tick, device], arrays["chunk"][tick, device] = op.micro_batch, op.chunk
            arrays["kind"][tick, device] = _kind(op.kind, last=last, trains=trains)
            arrays["first"][tick, device] = number == 0
            until = when[device][dataclasses.replace(op, kind=reader)]
            if op.kind == "F" and number > 0:
                inputs[device][op] = _made(when, "F", op, number - 1, S), until
            if op.kind == "B" and not last:
                gradients[device][op] = _made(when, "B", op, number + 1, S), until
    found = {}
    for kept, read, written in (inputs, "reads", "takes"), (gradients, "pulls", "gets"):
        slots = [_slots(one) for one in kept]
        count = found[written] = max((1 + slot for one in slots for slot in one.values()), default=0)
        arrays[written] = np.full((ticks, S), count, np.int32)
        for device in range(S):
            for source, slot in slots[device].items():
                arrays[written][kept[device][source][0], device] = slot
                for op, tick in when[device].items():
                    if (op.micro_batch, op.chunk) == (source.micro_batch, source.chunk):
                        arrays[read][tick, device] = slot
    return Table(
        **arrays,
        up=(arrays["takes"] < found["takes"]).any(1),
        down=(arrays["gets"] < found["gets"]).any(1),
        slots=found["takes"],
        gradient_slots=found["gets"],
    )


def _kind(kind: str, *, last: bool, trains: bool) -> int:
    if kind == "F":  # the backward pass of the last chunk makes its losses too
        return FORWARD if not last else IDLE if trains else LOSSES
    return {"B": (BACKWARD, BACKWARD_LAST), "W": (WEIGHTS, WEIGHTS_LAST)}[kind][last]


def _made(when: Sequence[Mapping[Op, int]], kind: str, op: Op, number: int, stages: int) -> int:
    """The tick in which global chunk `number` makes its part of the micro-batch."""
    return when[number % stages][Op(kind, op.micro_batch, number // stages)]


def _slots(lives: Mapping[Op, tuple[int, int]]) -> dict[Op, int]:
    """A slot for each array such that no two are kept in one at a time; a slot is free again in the tick of its last
    read, at whose end the next array arrives.
    """
    slots: dict[Op, int] = {}
    for op, (arrives, _) in sorted(lives.items(), key=lambda item: item[1]):
        taken = {slots[other] for other in slots if lives[other][1] > arrives}
        slots[op] = next(slot for slot in range(len(lives)) if slot not in taken)
    return slots


def chunk_rounds(stages: int, chunks: int) -> list[list[tuple[int, int, int]]]:
    """How chunks of layers change from the natural order to that of a schedule, in rounds of one permute.

    Device e holds chunks e * v .. e * v + v - 1 of all S * v; as its chunk c device d runs number c * S + d.

    Returns:
      for each round, by the sending device: (index of the chunk that it sends, receiving device, its chunk there).
      Each device sends and receives once a round: a v-regular bipartite graph falls into v perfect matchings.
    """
    number_of = {number: (number % stages, number // stages) for number in range(stages * chunks)}
    left = {e: {e * chunks + j for j in range(chunks)} for e in range(stages)}
    rounds = []
    for _ in range(chunks):
        sender_of: dict[int, tuple[int, int]] = {}  # by receiving device: who sends which chunk

        def place(e: int, tried: set[int], sender_of=sender_of) -> bool:
            for number in sorted(left[e]):
                d = number_of[number][0]
                if d in tried:
                    continue
                tried.add(d)
                if d not in sender_of or place(sender_of[d][0], tried):
                    sender_of[d] = e, number
                    return True
            return False

        for e in range(stages):
            assert place(e, set()), "a regular bipartite graph has a perfect matching"
        by_sender = {e: (number % chunks, d, number_of[number][1]) for d, (e, number) in sender_of.items()}
        for e, number in sender_of.values():
            left[e].remove(number)
        rounds.append([by_sender[e] for e in range(stages)])
    return rounds


# ---- the function with its gradient


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is static of one pipelined loss: see `pipelined_loss`."""

    stage: Callable
    last: Callable
    placement: Placement
    names: tuple[tuple, tuple]
    dtype: Any


def pipelined_loss(
    stage: Callable[[Sequence[jax.Array], jax.Array, Fields], jax.Array],
    last: Callable[[Sequence[jax.Array], jax.Array, Fields], jax.Array],
    stack: Part,
    ending: Part,
    inputs_BTD: jax.Array,
    fields: Fields,
    coefficients_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sum of coefficients times losses of the tokens, differentiable, and the losses, which are not.

    Args:
      stage: (leaves of some layers, x (b, T, D), fields) -> x behind these layers.
      last: (leaves of `ending`, x, fields) -> losses (b, T) float32.
      stack: all layers, with `layers` the first dim of each leaf. ending: what follows them.
      inputs_BTD: rows over all row axes. fields: arrays with rows first, which `stage` and `last` read.
    """
    placement = current()
    assert placement is not None
    names = tuple(tuple(None if name is None else tuple(name) for name in part.names) for part in (stack, ending))
    program = _Program(stage, last, placement, names, inputs_BTD.dtype)
    integers = {name: lax.stop_gradient(value) for name, value in fields.items()}
    numerator, losses_BT = _loss(
        program, tuple(stack.leaves), tuple(ending.leaves), inputs_BTD, integers, lax.stop_gradient(coefficients_BT)
    )
    return numerator, lax.stop_gradient(losses_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(program: _Program, stack, ending, inputs, fields, coefficients):
    numerator, losses, *_ = _on_mesh(program, stack, ending, inputs, fields, coefficients, None)
    return numerator, losses


def _loss_forward(program, stack, ending, inputs, fields, coefficients):
    learns = tuple(tuple(leaf.perturbed for leaf in part) for part in (stack, ending))
    values = jax.tree.map(lambda leaf: leaf.value, (stack, ending, inputs, fields, coefficients))
    numerator, losses, *gradients = _on_mesh(program, *values, learns)
    return (numerator, losses), gradients


def _loss_backward(program, gradients, cotangents):
    scale, _ = cotangents  # of the losses: stopped above
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    stack, ending, inputs = scaled
    return tuple(stack), tuple(ending), inputs, None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _on_mesh(program: _Program, stack, ending, inputs, fields, coefficients, learns):
    """`_on_device` under a shard_map over the row axes; other axes stay with the partitioner.

    Args:
      learns: for each leaf whether its gradient is wanted; None: no gradient at all.
    """
    mesh = program.placement.mesh

    def manual(names, leaf) -> PartitionSpec:
        spec = partition_spec(names, leaf.shape, mesh, staged=True)
        return PartitionSpec(*(axis if axis in ROW_AXES else None for axis in spec))

    rows = PartitionSpec(ROW_AXES)
    specs = tuple(
        tuple(manual(name, leaf) for name, leaf in zip(names, leaves, strict=True))
        for names, leaves in zip(program.names, (stack, ending), strict=True)
    )
    of_gradients = ()
    if learns is not None:
        wanted = [
            [spec if learn else None for spec, learn in zip(part, own, strict=True)]
            for part, own in zip(specs, learns, strict=True)
        ]
        of_gradients = (*map(tuple, wanted), rows)
    ambient = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        partial(_on_device, program, specs, learns),
        mesh=mesh if ambient.empty else ambient,
        in_specs=(*specs, rows, dict.fromkeys(fields, rows), rows),
        out_specs=(PartitionSpec(), rows, *of_gradients),
        axis_names={*ROW_AXES},
        check_vma=False,
    )(stack, ending, inputs, fields, coefficients)


def _on_device(program: _Program, specs, learns, stack, ending, inputs, fields, coefficients):
    """One device: gather, run the table, reduce."""
    mesh, parallel = program.placement.mesh, program.placement.parallel
    S, v = mesh.shape[AXIS], parallel.pipeline_chunks if learns is not None else 1
    M = parallel.micro_batches or inputs.shape[0] * S

    def whole(x):
        """The rows of this group of stages, as micro-batches."""
        x = lax.all_gather(x, AXIS, axis=0, tiled=True)
        return x.reshape(M, -1, *x.shape[1:])

    def gathered(leaf, spec):
        if FSDP not in spec or mesh.shape[FSDP] == 1:
            return leaf
        dtype = program.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return lax.all_gather(leaf.astype(dtype), FSDP, axis=spec.index(FSDP), tiled=True).astype(leaf.dtype)

    parts = [
        [gathered(leaf, spec) for leaf, spec in zip(leaves, part, strict=True)]
        for leaves, part in zip((stack, ending), specs, strict=True)
    ]
    given = jax.tree.map(whole, {**fields, "coefficients": coefficients})
    schedule = schedules.forward_alone(S, M) if learns is None else schedule_of(parallel, S, M)
    parts[0] = [_scheduled(leaf.reshape(v, -1, *leaf.shape[1:]), S) for leaf in parts[0]]
    done = _Run(program, schedule, parts, learns, whole(inputs), given).result()

    def own(x):
        """Each device's rows of a sum over stages."""
        return lax.psum_scatter(x.reshape(-1, *x.shape[2:]), AXIS, scatter_dimension=0, tiled=True)

    numerator = lax.psum(done["numerator"], ROW_AXES)
    if learns is None:
        return numerator, own(done["losses"])

    def reduced(gradient, like, spec, over_stages: bool):
        """Sum over the copies of a parameter; a device keeps its part."""
        if FSDP in spec and mesh.shape[FSDP] > 1:
            gradient = lax.psum_scatter(gradient, FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
        others = [axis for axis in ROW_AXES if axis not in spec and mesh.shape[axis] > 1]
        others = [axis for axis in others if axis != AXIS or over_stages]
        return (lax.psum(gradient, tuple(others)) if others else gradient).astype(like.dtype)

    of_stack, of_ending = done["gradients"]
    of_stack = [_scheduled(g, S, back=True) for g in of_stack]
    of_stack = [g.reshape(-1, *g.shape[2:]) for g in of_stack]
    found = []
    for number, (leaves, part) in enumerate(zip((stack, ending), specs, strict=True)):
        gradients = iter((of_stack, of_ending)[number])
        found.append(
            tuple(
                reduced(next(gradients), leaf, spec, over_stages=number == 1) if learn else None
                for leaf, spec, learn in zip(leaves, part, learns[number], strict=True)
            )
        )
    return numerator, own(done["losses"]), *found, own(done["dx"])


def _scheduled(leaf: jax.Array, stages: int, *, back: bool = False) -> jax.Array:
    """Chunks (v, layers, ..) of this device from the natural order to the schedule's, or back."""
    chunks = leaf.shape[0]
    if chunks == 1:
        return leaf
    stage = lax.axis_index(AXIS)
    out = jnp.zeros_like(leaf)
    for of_round in chunk_rounds(stages, chunks):
        moves = [(e, index, d, there) for e, (index, d, there) in enumerate(of_round)]
        if back:
            moves = [(d, there, e, index) for e, index, d, there in moves]
        sends, takes = np.zeros(stages, np.int32), np.zeros(stages, np.int32)
        for e, index, d, there in moves:
            sends[e], takes[d] = index, there
        moved = lax.ppermute(leaf[jnp.asarray(sends)[stage]], AXIS, [(e, d) for e, _, d, _ in moves])
        out = out.at[jnp.asarray(takes)[stage]].set(moved)
    return out


class _Run:
    """The loop over ticks on one device. Carried: what moves, what is kept, and the sums.

    Leaves of the layers are (chunks, layers of a chunk, ..).
    """

    def __init__(self, program: _Program, schedule: Schedule, parts, learns, x_MbTD, fields: Fields):
        self.program, self.table, self.parts, self.x, self.fields = program, table_of(schedule), parts, x_MbTD, fields
        self.S, self.M, self.wraps = schedule.stages, schedule.micro_batches, schedule.chunks > 1
        self.stage = lax.axis_index(AXIS)
        self.trains, self.splits_weights = learns is not None, schedule.splits_weights
        self.learning = [[i for i, learn in enumerate(own) if learn] for own in learns or ((), ())]

    def result(self) -> dict[str, Any]:
        carry = lax.scan(self.tick, self.empty(), jnp.arange(len(self.table.kind), dtype=jnp.int32))[0]
        return {**carry, "dx": carry["dx"][: self.M]} if self.trains else carry

    def empty(self) -> dict[str, Any]:
        _, *shape = self.x.shape
        dtype, table = self.x.dtype, self.table
        carry = {
            "up": jnp.zeros(shape, dtype),
            "inputs": jnp.zeros((table.slots + 1, *shape), dtype),  # the last slot takes what nobody reads
            "numerator": jnp.zeros((), jnp.float32),
            "losses": jnp.zeros((self.M, *shape[:2]), jnp.float32),
        }
        if not self.trains:
            return carry
        return carry | {
            "down": jnp.zeros(shape, dtype),
            "pulls": jnp.zeros((table.gradient_slots + 1, *shape), dtype),
            "dx": jnp.zeros((self.M + 1, *shape), dtype),
            "gradients": tuple(
                tuple(jnp.zeros(part[i].shape, jnp.float32) for i in own)
                for part, own in zip(self.parts, self.learning, strict=True)
            ),
        }

    def tick(self, carry, t):
        names = ("kind", "micro_batch", "chunk", "first", "reads", "pulls", "takes", "gets")
        here = {name: jnp.asarray(getattr(self.table, name))[t, self.stage] for name in names}
        branches = [lambda carry: carry, partial(self.forward, here), partial(self.losses, here)]
        both = {"x": True, "weights": not self.splits_weights}
        if self.trains:
            branches += [partial(self.backward, here, last=last, **both) for last in (False, True)]
        if self.trains and self.splits_weights:
            branches += [partial(self.backward, here, last=last, x=False, weights=True) for last in (False, True)]
        carry = lax.switch(here["kind"], branches, carry)
        up = [(s, s + 1) for s in range(self.S - 1)] + [(self.S - 1, 0)] * self.wraps
        carry = self.move(carry, t, here, "up", "inputs", "takes", up)
        if self.trains:
            carry = self.move(carry, t, here, "down", "pulls", "gets", [(b, a) for a, b in up])
        return carry, None

    def move(self, carry, t, here, what: str, kept: str, slot: str, pairs):
        """Send what this tick made to the neighbour, which keeps it."""
        arrived = lax.cond(
            jnp.asarray(getattr(self.table, what))[t], lambda x: lax.ppermute(x, AXIS, pairs), lambda x: x, carry[what]
        )
        return carry | {kept: carry[kept].at[here[slot]].set(arrived)}

    def given(self, carry, here) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Input and fields of the tick's micro-batch."""
        m = here["micro_batch"]
        x = lax.cond(here["first"] > 0, lambda: self.x[m], lambda: carry["inputs"][here["reads"]])
        return x, {name: value[m] for name, value in self.fields.items()}

    def layers(self, here) -> list[jax.Array]:
        return [leaf[here["chunk"]] if self.wraps else leaf[0] for leaf in self.parts[0]]

    def forward(self, here, carry):
        x, fields = self.given(carry, here)
        return carry | {"up": self.program.stage(self.layers(here), x, fields)}

    def losses(self, here, carry):
        if self.trains:  # no tick is of this kind
            return carry
        x, fields = self.given(carry, here)
        losses = self.program.last(self.parts[1], self.program.stage(self.layers(here), x, fields), fields)
        return self.count(carry, here, jnp.sum(losses * fields["coefficients"]), losses)

    def count(self, carry, here, numerator, losses):
        return carry | {
            "numerator": carry["numerator"] + numerator,
            "losses": carry["losses"].at[here["micro_batch"]].set(losses),
        }

    def backward(self, here, carry, *, last: bool, x: bool, weights: bool):
        """Recompute the chunk and pull its gradient back: of the input, of the weights, or of both."""
        given, fields = self.given(carry, here)
        parts = (self.layers(here), self.parts[1])
        # Of the ending only the last chunk has a gradient.
        learning = [own if weights and (last or number == 0) else [] for number, own in enumerate(self.learning)]

        def chunk(own, given):
            stack, ending = (
                [own[number].get(i, leaf) for i, leaf in enumerate(part)] for number, part in enumerate(parts)
            )
            y = self.program.stage(stack, given, fields)
            if not last:
                return y, None
            losses = self.program.last(ending, y, fields)
            return jnp.sum(losses * fields["coefficients"]), losses

        own = [{i: part[i] for i in indexes} for part, indexes in zip(parts, learning, strict=True)]
        if x:
            value, pull, losses = jax.vjp(chunk, own, given, has_aux=True)
        else:
            value, pull, losses = jax.vjp(lambda own: chunk(own, given), own, has_aux=True)
        found = pull(jnp.ones((), jnp.float32) if last else carry["pulls"][here["pulls"]])
        if last and x:
            carry = self.count(carry, here, value, losses)
        if weights:
            carry = carry | {"gradients": self.added(carry["gradients"], found[0], here)}
        if x:
            to_first = jnp.where(here["first"] > 0, here["micro_batch"], self.M)
            carry = carry | {"down": found[-1], "dx": carry["dx"].at[to_first].set(found[-1])}
        return carry

    def added(self, sums, found, here):
        """Gradients of a micro-batch added to the sums, in float32."""
        chunk = here["chunk"] if self.wraps else 0

        def add(number: int, total, i: int):
            if i not in found[number]:
                return total
            gradient = found[number][i].astype(jnp.float32)
            return total.at[chunk].add(gradient) if number == 0 else total + gradient

        return tuple(
            tuple(add(number, total, i) for total, i in zip(own, self.learning[number], strict=True))
            for number, own in enumerate(sums)
        )
