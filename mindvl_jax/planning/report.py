"""Format a plan as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mindvl_jax.config.schema import Config
from mindvl_jax.core.devices import GIB, Limit
from mindvl_jax.parallel.mesh import AXES, describe_sizes
from mindvl_jax.planning.alternatives import Tried
from mindvl_jax.planning.phase import PhasePlan
from mindvl_jax.training.display import human

SOURCES = {
    "npu_bridge": "Activations: the memory plan of the emitted torch program. Workspaces inside kernels are not in it.",
    "xla": "Activations: XLA's buffer assignment for virtual CPU devices: exact there; on a GPU or TPU usually too "
    "high (it fuses less and widens some bfloat16).",
}


def gib(count: int) -> str:
    return f"{count / GIB:,.2f}" if count >= GIB / 100 or count == 0 else f"{count / GIB:.4f}"


def show(
    console: Console, config: Config, plans: Sequence[PhasePlan], limit: Limit | None, topology: str | None = None
) -> None:
    """The plan as a table; `topology`: whose own compiler measured it."""
    mesh = describe_sizes({axis: getattr(config.mesh.filled, axis) for axis in AXES})
    devices = math.prod(getattr(config.mesh.filled, axis) for axis in AXES)
    console.print(
        f"{devices} device{'s' if devices > 1 else ''} ({mesh}), backend "
        f"{config.backend}{f' on {config.bridge.device}' if config.backend == 'npu_bridge' else ''}, "
        f"remat {config.model.remat}, compute {config.model.compute_dtype}; GiB on one device at the highest "
        "point of each phase",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.name, justify="right")
    table.add_row("parameters in all", *(human(plan.parameters) for plan in plans))
    table.add_row("of these trained", *(human(plan.trained) for plan in plans), end_section=True)
    for name in dict.fromkeys(name for plan in plans for name in plan.rows):
        table.add_row(name, *(gib(plan.rows.get(name, 0)) for plan in plans))
    table.add_section()
    table.add_row("total", *(gib(plan.total) for plan in plans), style="bold")
    table.add_row("reached in", *(plan.highest for plan in plans))
    if limit is not None:
        table.add_row(
            "headroom",
            *(f"{'-' if plan.total > limit.usable else ''}{gib(abs(limit.usable - plan.total))}" for plan in plans),
        )
        table.add_row("verdict", *("fits" if plan.total <= limit.usable else "does not fit" for plan in plans))
    console.print(table)
    if limit is not None:
        console.print(f"{gib(limit.usable)} of {gib(limit.whole)} GiB may be filled: {limit.said}.", highlight=False)
    source = (
        SOURCES[config.backend] if topology is None else f"Activations: XLA's own buffer assignment for {topology}."
    )
    console.print(source + " Decoding for scores is not counted.", highlight=False)


def show_difference(
    console: Console, topology: str, estimated: Sequence[PhasePlan], compiled: Sequence[PhasePlan]
) -> None:
    """Compare the estimate by XLA for CPU devices with the device compiler's plan."""
    for guess, real in zip(estimated, compiled, strict=True):
        off = guess.total / real.total - 1
        console.print(
            f"{real.name}: XLA for {topology} says {gib(real.total)} GiB; our estimate was "
            f"{gib(guess.total)} GiB ({off:+.0%})",
            highlight=False,
        )


def show_tried(console: Console, tried: Sequence[Tried], limit: Limit) -> None:
    fitting = [one for one in tried if one.fits]
    console.print("\nWhat would fit:" if fitting else "\nNothing that was tried fits; the nearest:", highlight=False)
    shown = fitting or sorted((one for one in tried if one.bytes is not None), key=lambda one: one.bytes)[:3]
    for one in shown:
        console.print(
            f"  {gib(one.bytes):>8} GiB  --set {' '.join(one.change.overrides)}\n{'':16}{one.change.cost}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    others = [one for one in tried if one not in shown]
    if others:
        console.print("Tried too:", highlight=False)
        for one in others:
            console.print(
                f"  {'-' if one.bytes is None else gib(one.bytes):>8} GiB  "
                f"{' '.join(one.change.overrides)}{f' ({one.why_not})' if one.why_not else ''}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def record(
    config: Config,
    plans: Sequence[PhasePlan],
    limit: Limit | None,
    tried: Sequence[Tried],
    estimates: Sequence[PhasePlan] | None = None,
) -> dict[str, Any]:
    """The plan in bytes, as `--json` prints it; `estimates`: ours, where `plans` are those of the device's compiler."""
    return {
        "backend": config.backend,
        "mesh": {axis: getattr(config.mesh.filled, axis) for axis in AXES},
        "memory": None if limit is None else {"whole": limit.whole, "usable": limit.usable},
        "fits": None if limit is None else all(plan.total <= limit.usable for plan in plans),
        "phases": [
            {
                "name": plan.name,
                "parameters": plan.parameters,
                "trained": plan.trained,
                "bytes": dict(plan.rows),
                "total": plan.total,
                "highest": plan.highest,
                "programs": {
                    name: {"arguments": program.arguments, "peak": program.peak}
                    for name, program in plan.programs.items()
                },
            }
            for plan in plans
        ],
        "estimated": None if estimates is None else {plan.name: plan.total for plan in estimates},
        "tried": [
            {
                "set": list(one.change.overrides),
                "cost": one.change.cost,
                "bytes": one.bytes,
                "fits": one.fits,
                "why_not": one.why_not,
            }
            for one in tried
        ],
    }
