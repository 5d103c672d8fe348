"""Cost of a compiled program's step on one device, by block of the model: products, memory, predicted time,
exchanges that run beside nothing. Read from the text of XLA's program; no device runs.

Loops count as often as they turn, which the compiler's own totals (`cost_analysis`) leave out.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

from mindvl_jax.profiling.blocks import COLLECTIVES, OTHER, block_of
from mindvl_jax.profiling.program import ARRAY, Instruction, Program, byte_count

_KERNELS = ("tpu_custom_call", "__cudnn$fmha")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "iota"}


@dataclasses.dataclass
class Use:
    """Sums over one step on one device.

    Attributes:
      flops: of products; kernels (custom calls) are not read. bytes: that operations read and write. seconds: of each
        operation the longer of its products at the device's peak and its bytes at full bandwidth, which no operation
        beats. kernels: calls of kernels, whose products are not in the text.
    """

    flops: float = 0
    bytes: float = 0
    seconds: float = 0
    kernels: int = 0

    def add(self, flops: float, bytes: float, seconds: float, kernels: int, times: int) -> None:
        self.flops += flops * times
        self.bytes += bytes * times
        self.seconds += seconds * times
        self.kernels += kernels * times


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: FLOP/s of bfloat16 products, bytes a second of its memory and out of it over all its links."""

    flops: float
    memory: float
    link: float


# From the makers' pages.
MACHINES = {
    "TPU v5p": Machine(459e12, 2765e9, 600e9),
    "TPU v6e": Machine(918e12, 1640e9, 448e9),
    "NVIDIA H100": Machine(989e12, 3350e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Exchanges of one kind and scope in a step: how many, bytes of their results, how many the program waits for where
    they stand (no computation between start and end).
    """

    kind: str
    block: str
    count: int
    bytes: float
    exposed: int


def by_block(program: Program, machine: Machine) -> dict[str, Use]:
    """Use of each block of the model, exchanges apart (`transfers`)."""
    found: dict[str, Use] = collections.defaultdict(Use)
    for computation, one, times in program.walk():
        if one.opcode in _FREE or one.opcode.endswith("-done") or program.exchange_of(one):
            continue
        size = program.bytes(computation, one) if one.opcode != "copy-start" else 0
        flops = program.flops(computation, one)
        seconds = max(flops / machine.flops, size / machine.memory)
        kernel = one.opcode == "custom-call" and any(name in one.rest for name in _KERNELS)
        found[program.blocks.get(one.name, OTHER)].add(flops, size, seconds, kernel, times)
    return dict(found)


def transfers(program: Program) -> list[Transfer]:
    """Exchanges of a step by kind and block, and how many of them stand alone in the schedule."""
    counts: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0])
    for computation, one, times in program.walk():
        kind = None if one.opcode.endswith("-done") else program.exchange_of(one)
        if kind is None:
            continue
        arrays = ARRAY.findall(one.result)
        if one.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[len(arrays) // 2 :]
        entry = counts[kind, block_of(one.scope)]
        entry[0] += times
        entry[1] += times * sum(map(byte_count, arrays))
        entry[2] += times * (not _overlaps(program, computation, one))
    return sorted(
        (Transfer(kind, block, int(n), size, int(exposed)) for (kind, block), (n, size, exposed) in counts.items()),
        key=lambda one: -one.bytes,
    )


def _overlaps(program: Program, computation: str, start: Instruction) -> bool:
    """Whether computation stands between the start of an exchange and its end; False where it has no end apart."""
    if not start.opcode.endswith("-start"):
        return False
    body = program.computations[computation]
    for one in body[body.index(start) + 1 :]:
        if one.opcode.endswith("-done") and start.name in one.operands:
            return False
        if one.opcode in ("fusion", "custom-call", "dot", "convolution", "while") and not program.exchange_of(one):
            return True
    return False


def table(program: Program, machine: Machine, totals: Mapping[str, float]) -> str:
    """Both as text, with the compiler's own totals below."""
    blocks = sorted(by_block(program, machine).items(), key=lambda item: -item[1].seconds)
    whole = Use()
    for _, use in blocks:
        whole.add(use.flops, use.bytes, use.seconds, use.kernels, 1)
    lines = [f"{'block':<30} {'ms, least':>9} {'TFLOP':>9} {'GiB':>9} {'kernels':>8}"]
    for name, use in [*blocks, ("together", whole)]:
        lines.append(
            f"{name:<30} {use.seconds * 1e3:>9.2f} {use.flops / 1e12:>9.3f} {use.bytes / 2**30:>9.2f} {use.kernels:>8}"
        )
    lines += ["", f"{'exchange':<20} {'of':<30} {'number':>7} {'GiB':>9} {'waited for':>11} {'ms at least':>12}"]
    exposed = 0.0
    for one in transfers(program):
        seconds = one.bytes / machine.link
        exposed += seconds * one.exposed / one.count
        lines.append(
            f"{one.kind:<20} {one.block:<30} {one.count:>7} {one.bytes / 2**30:>9.3f} {one.exposed:>11} "
            f"{seconds * 1e3:>12.2f}"
        )
    lines.append(f"\n{COLLECTIVES} that nothing hides: {exposed * 1e3:.2f} ms at least")
    lines.append(
        f"at least {(whole.seconds + exposed) * 1e3:.2f} ms a step; its products alone take "
        f"{whole.flops / machine.flops / (whole.seconds + exposed):.0%} of that at the device's peak"
    )
    if totals:
        said = "; ".join(f"{name} {value:.4g}" for name, value in totals.items())
        lines.append(f"the compiler's own totals, loops counted once: {said}")
    return "\n".join(lines)
