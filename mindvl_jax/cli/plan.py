"""`mindvl plan`: whether a run fits its devices, told before it starts, on any machine.

mindvl plan --config C --devices 512 --device-kind "Ascend 910B"
mindvl plan --config C --set mesh.fsdp=8 --memory 80GiB --json
mindvl plan --config C --devices 64 --device-kind "TPU v5p" --compile     (with libtpu installed)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindvl_jax.cli import common
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.progress import LogConsole, counting, working

if TYPE_CHECKING:  # both bring JAX, which looks for devices when it is imported
    from mindvl_jax.planning.alternatives import Tried
    from mindvl_jax.planning.phase import PhasePlan

EPILOG = common.examples(
    'mindvl plan --config qwen2.5-vl-7b --devices 8 --device-kind "NVIDIA H100"',
    "mindvl plan --config my.yaml --set mesh.fsdp=8 --memory 80GiB --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML configuration of the run")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="dotted overrides, for example mesh.fsdp=64",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices there will be; fills the axis of the mesh that is -1, or all of a mesh that is not set",
    )
    parser.add_argument("--memory", metavar="SIZE", help="memory of one device, such as 64GiB")
    parser.add_argument(
        "--device-kind", metavar="NAME", help='its kind instead, such as "NVIDIA H100" or "Ascend 910B"'
    )
    parser.add_argument(
        "--compile",
        metavar="TOPOLOGY",
        nargs="?",
        const="",
        help="ask the device's own compiler, which needs libtpu (TPU) or jax's CUDA plugin (H100) and no device; "
        "minutes for each phase. A name such as v5p:4x4x4 or h100:1x1x8; without one the usual shape of --devices of "
        "--device-kind",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the memory left to allocator, driver and kernels (default: %(default)s)",
    )
    parser.add_argument("--no-alternatives", action="store_true", help="do not look for what would fit")
    parser.add_argument(
        "--timeline", metavar="PNG", help="with mesh.stage > 1: draw the first phase's pipeline schedule into this file"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """0: fits, or no memory was named; 1: does not fit; UserError: cannot be planned."""
    _require_possible(args)
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes only; an accelerator of this machine is left to whoever uses it
    common.load_slow("mindvl_jax.planning.aot")
    from rich.console import Console

    from mindvl_jax.core.devices import limit_of
    from mindvl_jax.planning import aot, report
    from mindvl_jax.planning.peak import measure
    from mindvl_jax.planning.phase import Planner

    console = Console(width=None if sys.stdout.isatty() else 160)
    watched = LogConsole(stderr=True, stamp=False)
    topology, devices = _machine(args)
    config = load(args.config, args.set, devices, _device_bytes(args))
    if topology is not None and config.backend != "xla":
        raise UserError(f"--compile asks XLA, but backend is {config.backend}; add --set backend=xla")
    limit = limit_of(args.memory, args.device_kind, margin=args.margin, backend=config.backend)
    planner = Planner(config, measure)
    with working(watched, "planning " + ", ".join(phase.name for phase in config.training.phases)):
        plans = planner.plan()
    estimates = plans
    if topology is not None:
        with working(watched, f"compiling for {topology}"):
            plans = Planner(config, functools.partial(aot.measure, topology=topology)).plan()
        if not args.json:
            report.show_difference(console, topology, estimates, plans)
    fits = limit is None or all(plan.total <= limit.usable for plan in plans)
    if not args.json:
        report.show(console, config, plans, limit, topology)
    _timeline(args, config, console)
    tried = []
    if not fits and not args.no_alternatives:
        tried = _alternatives(args, config, plans, limit.usable, watched, topology)
        if not args.json:
            report.show_tried(console, tried, limit)
    if args.json:
        print(json.dumps(report.record(config, plans, limit, tried, estimates if topology else None), indent=1))
    elif limit is None:
        console.print(
            "No verdict: say how much memory a device has by --memory 64GiB or --device-kind NAME.", highlight=False
        )
    return 0 if fits else 1


def _timeline(args: argparse.Namespace, config: Config, console: Any) -> None:
    """Say how long stages are idle in each phase, and draw the first phase's schedule."""
    from mindvl_jax.planning import timeline

    if config.mesh.filled.stage == 1:
        if args.timeline:
            raise UserError("--timeline draws a pipeline's schedule, but mesh.stage is 1")
        return
    said = {}
    for phase in config.training.phases:
        drawn = timeline.timeline_of(config, phase.rows)
        said.setdefault(timeline.describe(*drawn), []).append(phase.name)
    if not args.json:
        for line, phases in said.items():
            console.print(f"{', '.join(phases)}: {line}", highlight=False)
    if args.timeline:
        path = Path(args.timeline)
        if path.suffix != ".png":
            raise UserError(f"--timeline {path}: expected a name that ends in .png")
        timeline.draw(*timeline.timeline_of(config, config.training.phases[0].rows), path)


def _require_possible(args: argparse.Namespace) -> None:
    if args.memory is not None and args.device_kind is not None:
        raise UserError("--memory and --device-kind both say how much memory a device has; give one of them")
    if not 0 <= args.margin < 1:
        raise UserError(f"--margin is {args.margin}; expected a share of the memory from 0 to below 1")


def _machine(args: argparse.Namespace) -> tuple[str | None, int | None]:
    """Topology to compile for and number of devices, each None where nobody says it; the topology's kind of device is
    taken for --device-kind.
    """
    from mindvl_jax.planning import topologies

    topology, devices = args.compile, args.devices
    if topology == "":
        if devices is None or args.device_kind is None:
            raise UserError("--compile without a topology takes that of --devices N of --device-kind NAME; give both")
        topology = topologies.topology_of(args.device_kind, devices)
    if topology is not None:
        devices = len(topologies.topology_devices(topology)) if devices is None else devices
        if args.memory is None and args.device_kind is None:
            args.device_kind = topologies.device_kind(topology)
    return topology, devices


def _alternatives(
    args: argparse.Namespace,
    config: Config,
    plans: Sequence[PhasePlan],
    usable: int,
    watched: LogConsole,
    topology: str | None,
) -> list[Tried]:
    """Show the changes tried to make the run fit; with a topology its own compiler decides."""
    from mindvl_jax.planning import aot
    from mindvl_jax.planning.alternatives import confirm, search
    from mindvl_jax.planning.peak import measure
    from mindvl_jax.planning.phase import Planner

    # Overrides of a change come last; the mesh is then whole numbers, which --devices must not fill again.
    fixed = [*args.set, *(f"mesh.{axis}={size}" for axis, size in config.mesh if size is not None)]

    def planner_of(overrides, measure=measure):
        return Planner(load(args.config, [*fixed, *overrides], None), measure)

    watched.print("does not fit; looking for what would (each change is compiled; --no-alternatives leaves this out)")
    with counting(watched) as show:
        number = itertools.count(1)
        tried = search(config, plans, usable, planner_of, say=lambda text: show(next(number), 0, f"planning {text}"))
        if topology is None:
            return tried
        compiled = functools.partial(planner_of, measure=functools.partial(aot.measure, topology=topology))
        return confirm(tried, compiled, usable, say=lambda text: show(next(number), 0, f"compiling {text}"))


def _device_bytes(args: argparse.Namespace) -> int | None:
    from mindvl_jax.core.devices import known_memory, parse_memory

    if args.memory is not None:
        return parse_memory(args.memory)
    return None if args.device_kind is None else known_memory(args.device_kind)


def load(path: str, overrides: Sequence[str], devices: int | None, device_bytes: int | None = None) -> Config:
    """The configuration with a mesh of whole numbers; without a mesh the one that training would choose."""
    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.planning.phase import planned_mesh
    from mindvl_jax.training.devices import mesh_for

    config = common.load_config(path, overrides)
    mesh = config.mesh
    if mesh.is_open and devices is not None:
        mesh = mesh_for(config, outline_of(config.model, config.adapters), devices, device_bytes, processes=2)[0]
    return config.model_copy(update=dict(mesh=planned_mesh(mesh, devices)))
