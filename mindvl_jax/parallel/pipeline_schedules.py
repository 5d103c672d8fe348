"""Pipeline schedules as data: which device computes what in which order, checked and timed by one simulator.

S stages, one a device; v chunks of layers on each device (global chunk c * S + d is chunk c of device d); M
micro-batches. A device carries out its list in order and waits where an input is not there yet. F is a forward pass of
one chunk, B its backward pass, W the weight gradients alone where a schedule splits them off; B is then the input
gradient alone.

`parallel.pipeline` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from mindvl_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, order=True)
class Op:
    """One piece of work: `kind` is F, B or W."""

    kind: str
    micro_batch: int
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of each device, in order."""

    name: str
    stages: int
    chunks: int
    micro_batches: int
    orders: tuple[tuple[Op, ...], ...]

    @property
    def splits_weights(self) -> bool:
        return any(op.kind == "W" for op in self.orders[0])


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule on the clock.

    Attributes:
      spans: of each device (op, begin, end). length: from the first begin to the last end. idle: of each device.
      in_flight: of each device the most chunk inputs that it holds at one time.
    """

    spans: tuple[tuple[tuple[Op, float, float], ...], ...]
    length: float
    idle: tuple[float, ...]
    in_flight: tuple[int, ...]


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes: what differentiating a pipelined loop gives."""
    everything = [Op(kind, m) for kind in "FB" for m in range(micro_batches)]
    return Schedule("gpipe", stages, 1, micro_batches, (tuple(everything),) * stages)


def forward_alone(stages: int, micro_batches: int) -> Schedule:
    """No backward pass: losses of held-out samples."""
    return Schedule("forward", stages, 1, micro_batches, (tuple(Op("F", m) for m in range(micro_batches)),) * stages)


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """As many forward passes as stages lie behind, then forward and backward in turn (PipeDream, arXiv 2006.09503)."""
    orders = []
    for device in range(stages):
        warm = min(stages - device - 1, micro_batches)
        orders.append(tuple(_in_turn(warm, micro_batches, lambda m: Op("F", m), lambda m: Op("B", m))))
    return Schedule("1f1b", stages, 1, micro_batches, tuple(orders))


def interleaved(stages: int, chunks: int, micro_batches: int) -> Schedule:
    """1F1B with several chunks a device, in groups of S micro-batches (arXiv 2104.04473, section 2.2).

    Raises:
      UserError: S does not divide M.
    """
    if micro_batches % stages:
        raise UserError(
            f"the interleaved schedule takes micro-batches in groups of one a stage: {micro_batches} are no multiple "
            f"of {stages}; use {micro_batches // stages * stages or stages} or {-(-micro_batches // stages) * stages}"
        )
    total = chunks * micro_batches

    def place(number: int) -> tuple[int, int]:
        group, rest = divmod(number, stages * chunks)
        return group * stages + rest % stages, rest // stages

    def forward(number: int) -> Op:
        return Op("F", *place(number))

    def backward(number: int) -> Op:
        micro_batch, chunk = place(number)
        return Op("B", micro_batch, chunks - 1 - chunk)

    orders = []
    for device in range(stages):
        warm = 2 * (stages - device - 1) + (chunks - 1) * stages if chunks > 1 else stages - device - 1
        orders.append(tuple(_in_turn(min(warm, total), total, forward, backward)))
    return Schedule("interleaved", stages, chunks, micro_batches, tuple(orders))


def zero_bubble(stages: int, micro_batches: int) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): 1F1B's order and memory, with weight gradients moved into its gaps.

    Device d puts weight gradients off by d micro-batches: together with the S - d inputs that wait for their backward
    pass it holds S, as many as the first stage of 1F1B.
    """
    orders = []
    for device in range(stages):
        warm = min(stages - device, micro_batches)
        order = [Op("F", m) for m in range(warm)]
        for m in range(micro_batches):
            order.append(Op("B", m))
            if m >= device:
                order.append(Op("W", m - device))
            if warm + m < micro_batches:
                order.append(Op("F", warm + m))
        order += [Op("W", m) for m in range(max(0, micro_batches - device), micro_batches)]
        orders.append(tuple(order))
    return Schedule("zero_bubble", stages, 1, micro_batches, tuple(orders))


def simulate(schedule: Schedule, times: Mapping[str, float]) -> Timeline:
    """Run the lists on the clock; exchanges take no time.

    Args:
      times: of F, B and (where split off) W of a whole device's layers; a chunk takes its share.

    Raises:
      ValueError: the lists wait for each other, or do not hold each piece of work exactly once.
    """
    _require_complete(schedule)
    share = {kind: time / schedule.chunks for kind, time in times.items()}
    done: dict[tuple[Op, int], float] = {}
    clock, next_of = [0.0] * schedule.stages, [0] * schedule.stages
    spans: list[list[tuple[Op, float, float]]] = [[] for _ in range(schedule.stages)]
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(schedule.orders):
            while next_of[device] < len(order):
                op = order[next_of[device]]
                inputs = list(_inputs(op, device, schedule.stages, schedule.chunks))
                if any(one not in done for one in inputs):
                    break
                begin = max([clock[device], *(done[one] for one in inputs)])
                clock[device] = done[op, device] = begin + share[op.kind]
                spans[device].append((op, begin, clock[device]))
                next_of[device] += 1
                moved = True
    if waiting := [device for device, order in enumerate(schedule.orders) if next_of[device] < len(order)]:
        raise ValueError(f"{schedule.name}: devices {waiting} wait for each other")
    length = max(clock)
    return Timeline(
        spans=tuple(map(tuple, spans)),
        length=length,
        idle=tuple(length - sum(end - begin for _, begin, end in own) for own in spans),
        in_flight=tuple(_most_held(order, schedule.splits_weights) for order in schedule.orders),
    )


def bubble(schedule: Schedule, times: Mapping[str, float]) -> float:
    """Idle time of each device by formula. B of `times` is the whole backward pass, or that without W."""
    forward, backward = times["F"], times["B"]
    if schedule.name == "zero_bubble":
        return (schedule.stages - 1) * (forward + backward - times["W"])
    return (schedule.stages - 1) * (forward + backward) / schedule.chunks


def picture(timeline: Timeline, unit: float) -> str:
    """One line a device with a column for each `unit` of time: F as the micro-batch's last digit, B as a letter, W as
    `w`, idle as a dot.
    """
    lines = []
    for own in timeline.spans:
        columns = ["."] * round(timeline.length / unit)
        for op, begin, end in own:
            mark = {"F": str(op.micro_batch % 10), "B": chr(ord("a") + op.micro_batch % 26), "W": "w"}[op.kind]
            columns[round(begin / unit) : round(end / unit)] = [mark] * (round(end / unit) - round(begin / unit))
        lines.append("".join(columns))
    return "\n".join(lines)


def _in_turn(warm: int, total: int, forward, backward) -> Iterator[Op]:
    yield from map(forward, range(warm))
    for number in range(total - warm):
        yield forward(warm + number)
        yield backward(number)
    yield from map(backward, range(total - warm, total))


def _inputs(op: Op, device: int, stages: int, chunks: int) -> Iterator[tuple[Op, int]]:
    """Work whose results this reads, with its device."""
    if op.kind == "W":
        yield dataclasses.replace(op, kind="B"), device
        return
    here = op.chunk * stages + device
    if op.kind == "B":
        yield dataclasses.replace(op, kind="F"), device
    other = here - 1 if op.kind == "F" else here + 1
    if 0 <= other < stages * chunks:
        yield Op(op.kind, op.micro_batch, other // stages), other % stages


def _most_held(order: tuple[Op, ...], splits_weights: bool) -> int:
    held = most = 0
    for op in order:
        held += {"F": 1, "W" if splits_weights else "B": -1}.get(op.kind, 0)
        most = max(most, held)
    return most


def _require_complete(schedule: Schedule) -> None:
    kinds = "F" if schedule.name == "forward" else "FBW" if schedule.splits_weights else "FB"
    wanted = {
        Op(kind, m, chunk) for kind in kinds for m in range(schedule.micro_batches) for chunk in range(schedule.chunks)
    }
    for device, order in enumerate(schedule.orders):
        if len(order) != len(wanted) or set(order) != wanted:
            raise ValueError(f"{schedule.name}: device {device} does not do each piece of work exactly once")
