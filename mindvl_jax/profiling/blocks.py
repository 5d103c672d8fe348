"""Map `named_scope` paths to blocks of the model, and sum times by block."""

from __future__ import annotations

import dataclasses
import re

from mindvl_jax.models.registry import SPECS

HOST = "host"
COLLECTIVES = "collectives"
OTHER = "other"
_PARTS = (*dict.fromkeys(part for spec in SPECS.values() for part in spec.parts), "loss", "optimizer")
_PIECES = ("patch_embed", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """Times in seconds, summed over the profiled steps.

    Attributes:
      seconds: by block; adds up to `busy`.
      busy: time in which at least one operation of the step's programs ran.
      aside: wall time spent by profiling itself.
      notes: caveats, printed below the table.
    """

    seconds: dict[str, float]
    busy: float
    aside: float = 0.0
    notes: tuple[str, ...] = ()


def block_of(path: str) -> str:
    """Return the block of a scope path (XLA's `op_name` or a scope of npu_bridge), such as "language mlp, backward".

    The first part of a model in the path counts (`ModelSpec.parts`, such as `vision`; `loss`, `optimizer`), then the
    sub-layer in it. JAX writes the backward pass of a scope as `transpose(jvp(scope))`.
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
