"""Pipeline executor: runs a schedule's table over the `stage` axis of the mesh.

Each device of the axis holds the same number of a decoder's layers. The rows of its group are cut into micro-batches,
which walk through the stages: activations go up, gradients come down, one permute of each kind a tick at most. The
table says what a device does in a tick; a device runs its own branch alone.

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

from mindvl_jax.parallel import pipeline_schedules as schedules
from mindvl_jax.parallel.activations import Placement, current
from mindvl_jax.parallel.mesh import FSDP, ROW_AXES
from mindvl_jax.parallel.pipeline_schedules import Op, Schedule
from mindvl_jax.parallel.rules import partition_spec

AXIS = "stage"
IDLE, FORWARD, LOSSES, BACKWARD, WEIGHTS = range(5)
"""What a device does in a tick; LOSSES is the last stage's forward pass where no backward pass follows."""

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
      kind: IDLE, FORWARD, LOSSES, BACKWARD or WEIGHTS. micro_batch: of that work.
      reads, pulls: slot of its input, slot of the gradient of its output.
      takes, gets: slot into which the input or gradient is written that arrives at the end of the tick; the one behind
        the last where none does.
      slots, gradient_slots: how many a device needs.
    """

    kind: np.ndarray
    micro_batch: np.ndarray
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


def schedule_of(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule of a configuration's name (`parallel.pipeline_schedule`)."""
    return {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b, "zero_bubble": schedules.zero_bubble}[name](
        stages, micro_batches
    )


def table_of(schedule: Schedule) -> Table:
    """Cut a schedule of one chunk a device into ticks, and give every input and gradient a slot while it is needed."""
    if schedule.chunks != 1:
        raise ValueError(f"{schedule.name}: the executor runs one chunk a device, not {schedule.chunks}")
    S, spans = schedule.stages, schedules.simulate(schedule, {"F": 1.0, "B": 1.0, "W": 1.0}).spans
    ticks = round(max(end for own in spans for _, _, end in own))
    trains = any(op.kind == "B" for op in schedule.orders[0])
    when = [{op: round(begin) for op, begin, _ in own} for own in spans]
    arrays = {name: np.zeros((ticks, S), np.int32) for name in ("kind", "micro_batch", "reads", "pulls")}
    for device in range(S):
        for op, tick in when[device].items():
            arrays["micro_batch"][tick, device] = op.micro_batch
            arrays["kind"][tick, device] = _kind(op, last=device == S - 1, trains=trains)
    used_last = [op.kind for op in schedule.orders[0]][-1]  # F, B or W: the work that reads a kept array last

    def life(device: int, m: int, source: Op, sender: int) -> tuple[int, int]:
        """Ticks at the end of which an array arrives and in which it is read last."""
        return when[sender][source], when[device][Op(used_last, m)]

    M = range(schedule.micro_batches)
    inputs = [{m: life(d, m, Op("F", m), d - 1) for m in M} if d else {} for d in range(S)]
    gradients = [{m: life(d, m, Op("B", m), d + 1) for m in M} if trains and d < S - 1 else {} for d in range(S)]
    found = {}
    for kept, read, written in (inputs, "reads", "takes"), (gradients, "pulls", "gets"):
        slots = [_slots(one) for one in kept]
        count = found[written] = max((1 + slot for one in slots for slot in one.values()), default=0)
        arrays[written] = np.full((ticks, S), count, np.int32)
        for device in range(S):
            for m, slot in slots[device].items():
                arrays[written][kept[device][m][0], device] = slot
                for op, tick in when[device].items():
                    if op.micro_batch == m:
                        arrays[read][tick, device] = slot
    return Table(
        **arrays,
        up=(arrays["takes"] < found["takes"]).any(1),
        down=(arrays["gets"] < found["gets"]).any(1),
        slots=found["takes"],
        gradient_slots=found["gets"],
    )


def _kind(op: Op, *, last: bool, trains: bool) -> int:
    if op.kind == "F":  # the last stage's backward pass makes the loss too
        return FORWARD if not last else IDLE if trains else LOSSES
    return {"B": BACKWARD, "W": WEIGHTS}[op.kind]


def _slots(lives: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """A slot for each micro-batch such that no two are kept in one at a time; a slot is free again in the tick of its
    last read, at whose end the next array arrives.
    """
    slots: dict[int, int] = {}
    for m, (arrives, _) in sorted(lives.items(), key=lambda item: item[1]):
        taken = {slots[other] for other in slots if lives[other][1] > arrives}
        slots[m] = next(slot for slot in range(len(lives)) if slot not in taken)
    return slots


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
    S = mesh.shape[AXIS]
    own_rows = inputs.shape[0]
    M = parallel.micro_batches or own_rows * S

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
    x_MbTD = whole(inputs)
    schedule = schedules.forward_alone(S, M) if learns is None else schedule_of(parallel.pipeline_schedule, S, M)
    done = _Run(program, schedule, parts, learns, x_MbTD, given).result()

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

    found = []
    for number, (leaves, part) in enumerate(zip((stack, ending), specs, strict=True)):
        gradients = iter(done["gradients"][number])
        found.append(
            tuple(
                reduced(next(gradients), leaf, spec, over_stages=number == 1) if learn else None
                for leaf, spec, learn in zip(leaves, part, learns[number], strict=True)
            )
        )
    return numerator, own(done["losses"]), *found, own(done["dx"])


class _Run:
    """The loop over ticks on one device. Carried: what moves, what is kept, and the sums."""

    def __init__(self, program: _Program, schedule: Schedule, parts, learns, x_MbTD, fields: Fields):
        self.program, self.table, self.parts, self.x, self.fields = program, table_of(schedule), parts, x_MbTD, fields
        self.S, self.M = schedule.stages, schedule.micro_batches
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
        here = {
            name: jnp.asarray(getattr(self.table, name))[t, self.stage]
            for name in ("kind", "micro_batch", "reads", "pulls", "takes", "gets")
        }
        is_last = self.stage == self.S - 1

        def idle(carry):
            return carry

        def on_last(of_last: Callable, of_others: Callable) -> Callable:
            return lambda carry: lax.cond(is_last, partial(of_last, here), partial(of_others, here), carry)

        def backward(x: bool, weights: bool) -> Callable:
            return on_last(
                partial(self.backward, last=True, x=x, weights=weights),
                partial(self.backward, last=False, x=x, weights=weights),
            )

        branches = [idle, partial(self.forward, here), idle if self.trains else partial(self.losses, here)]
        if self.trains:
            branches.append(backward(x=True, weights=not self.splits_weights))
        if self.splits_weights and self.trains:
            branches.append(backward(x=False, weights=True))
        carry = lax.switch(here["kind"], branches, carry)
        carry = self.move(carry, t, here, "up", "inputs", "takes", [(s, s + 1) for s in range(self.S - 1)])
        if self.trains:
            carry = self.move(carry, t, here, "down", "pulls", "gets", [(s + 1, s) for s in range(self.S - 1)])
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
        x = lax.cond(self.stage == 0, lambda: self.x[m], lambda: carry["inputs"][here["reads"]])
        return x, {name: value[m] for name, value in self.fields.items()}

    def forward(self, here, carry):
        x, fields = self.given(carry, here)
        return carry | {"up": self.program.stage(self.parts[0], x, fields)}

    def losses(self, here, carry):
        x, fields = self.given(carry, here)
        losses = self.program.last(self.parts[1], self.program.stage(self.parts[0], x, fields), fields)
        return self.count(carry, here, jnp.sum(losses * fields["coefficients"]), losses)

    def count(self, carry, here, numerator, losses):
        return carry | {
            "numerator": carry["numerator"] + numerator,
            "losses": carry["losses"].at[here["micro_batch"]].set(losses),
        }

    def backward(self, here, carry, *, last: bool, x: bool, weights: bool):
        """Recompute the chunk and pull its gradient back: of the input, of the weights, or of both."""
        given, fields = self.given(carry, here)
        learning = self.learning if weights else ((), ())

        def chunk(own, given):
            stack, ending = (
                [own[number].get(i, leaf) for i, leaf in enumerate(part)] for number, part in enumerate(self.parts)
            )
            y = self.program.stage(stack, given, fields)
            if not last:
                return y, None
            losses = self.program.last(ending, y, fields)
            return jnp.sum(losses * fields["coefficients"]), losses

        own = tuple({i: part[i] for i in indexes} for part, indexes in zip(self.parts, learning, strict=True))
        if not last:
            own = (own[0], {})
        value, pull, losses = jax.vjp(
            chunk if x else partial(_second_fixed, chunk, given), own, *([given] * x), has_aux=True
        )
        found = pull(jnp.ones((), jnp.float32) if last else carry["pulls"][here["pulls"]])
        if last and x:
            carry = self.count(carry, here, value, losses)
        if weights:
            sums = zip(carry["gradients"], found[0], learning, strict=True)
            carry = carry | {
                "gradients": tuple(
                    tuple(s + of[i].astype(jnp.float32) if i in of else s for s, i in zip(total, indexes, strict=True))
                    for total, of, indexes in sums
                )
            }
        if x:
            to_first = jnp.where(self.stage == 0, here["micro_batch"], self.M)
            carry = carry | {"down": found[-1], "dx": carry["dx"].at[to_first].set(found[-1])}
        return carry


def _second_fixed(function: Callable, second, first):
    return function(first, second)
