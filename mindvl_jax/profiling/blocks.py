"""Which part of the model a `named_scope` path belongs to, and the times of these parts."""

from __future__ import annotations

import dataclasses
import re

HOST = "host"
COLLECTIVES = "collectives"
OTHER = "other"
_PARTS = ("vision", "projector", "language", "loss", "optimizer")
_PIECES = ("patch_embed", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """Times in seconds, summed over the profiled steps.

    Attributes:
      seconds: by block; adds up to `busy`.
      busy: time in which anything of the step's programs ran.
      aside: of the wall time, what profiling itself took.
      notes: what the reader of the table must know.
    """

    seconds: dict[str, float]
    busy: float
    aside: float = 0.0
    notes: tuple[str, ...] = ()


def block_of(path: str) -> str:
    """The block of a scope's path (an `op_name` of XLA, a scope of npu_bridge), for example "language mlp, backward".

    The first named part counts (`vision`, `projector`, `language`, `loss`, `optimizer`), then the piece of a layer inside of it.
    JAX writes the backward pass of a scope as `transpose(jvp(scope))`.
    """
    words = re.findall(r"\w+", path)
    part = next((word for word in words if word in _PARTS), None)
    if part is None:
        return OTHER
    piece = next((word for word in words[words.index(part) + 1 :] if word in _PIECES), None)
    name = part if piece is None else f"{part} {piece}"
    if part == "optimizer":
        return name
    return f"{name}, backward" if "transpose(" in path else f"{name}, forward"
