"""Compile training steps with the real XLA:TPU, without a device: does it fit, what does it exchange, which kernels
does it call.

    python -m mindvl_jax.planning.aot --page docs/aot.md            # the everyday cases: true widths, few layers
    python -m mindvl_jax.planning.aot --full --page docs/aot.md     # by hand: full depth, minutes for each phase

Needs libtpu beside jax (`make aot` keeps an environment of its own for it); neither a driver nor a device. Fails when
the compiler gathers or sums a batch in a mesh of fsdp alone, holds a score matrix, or runs out of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mindvl_jax.config import loader
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXES
from mindvl_jax.planning.exchanges import Exchange, exchanges
from mindvl_jax.planning.phase import Measured, ProgramBytes, lowerings, planned_mesh
from mindvl_jax.training.xla_backend import compile_xla

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One phase of a recipe on one machine.

    Attributes:
      topology: as libtpu names it: chip and shape, `v5p:2x2x1`. phase: its number. overrides: of the configuration.
      depth: what is said of the depth on the page.
    """

    config: str
    topology: str
    phase: int
    overrides: tuple[str, ...] = ()
    depth: str = "full"


_CUT_MINDVL = ("model.text.num_layers=2", "model.vision.depth=2", "model.vision.fullatt_block_indexes=[1]")
EVERYDAY = (
    Case(
        "configs/mindvl-8b.yaml",
        "v5p:2x2x1",
        1,
        (*_CUT_MINDVL, "training.phases.1.rows=4"),
        "2 decoder layers, 2 vision blocks, 1 row a chip",
    ),
    Case(
        "configs/mindvl-8b.yaml",
        "v5p:2x2x1",
        1,
        (*_CUT_MINDVL, "training.phases.1.rows=2", "mesh.fsdp=2", "mesh.tensor=2"),
        "2 decoder layers, 2 vision blocks, 1 row a group",
    ),
)
FULL = (
    *(Case("configs/mindvl-8b.yaml", "v5p:4x4x4", phase) for phase in range(3)),
    Case("configs/qwen2.5-vl-7b.yaml", "v5p:2x2x2", 0),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one program, for one device.

    Attributes:
      arguments, temporaries: bytes. calls: custom calls by target. seconds: of compilation. refused: the compiler's
        words when it did not compile.
    """

    case: Case
    program: str
    mesh: dict[str, int]
    arguments: int = 0
    temporaries: int = 0
    exchanges: Sequence[Exchange] = ()
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: Sequence[str] = ()
    seconds: float = 0.0
    refused: str = ""


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices that can be compiled for and nothing else.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # classes of the plugin's errors are not public
        raise UserError(
            f"XLA:TPU cannot describe {topology!r}: {str(error).splitlines()[0]}; it needs libtpu (`make "
            "aot` installs it) and a name such as v5p:4x4x4"
        ) from error


def topology_mesh(config: Config, topology: str) -> Mesh:
    """The mesh of the configuration over all devices of a topology."""
    devices = topology_devices(topology)
    sizes = planned_mesh(config.mesh, len(devices))
    return Mesh(
        np.array(devices).reshape([getattr(sizes, axis) for axis in AXES]),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def compile_case(case: Case) -> list[Compiled]:
    """Compile every program of the case's phase and look for what must not be in it."""
    config = loader.load(case.config, [*case.overrides])
    mesh = topology_mesh(config, case.topology)
    found = []
    for name, lowered in lowerings(
        config, case.phase, mesh, functools.partial(compile_xla, attention=config.model.attention)
    ):
        begin = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found.append(
                Compiled(
                    case, name, dict(mesh.shape), refused=str(error).splitlines()[0], faults=["the compiler refused it"]
                )
            )
            continue
        memory, text = compiled.memory_analysis(), compiled.as_text()
        calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        found.append(
            Compiled(
                case,
                name,
                dict(mesh.shape),
                memory.argument_size_in_bytes,
                beyond_arguments(memory),
                exchanges(text),
                calls,
                faults_of(text, config, case.phase, mesh),
                time.monotonic() - begin,
            )
        )
    return found


def measure(config: Config, indexes: Sequence[int], topology: str) -> list[Measured]:
    """What the programs of these phases need on one chip of a topology, by its own compiler; for
    `planning.phase.Planner`.

    Raises:
      UserError: the topology is unknown, or the compiler refuses a program; its words say how much memory is missing.
    """
    mesh = topology_mesh(config, topology)
    measured = []
    for index in indexes:
        programs = {}
        for name, lowered in lowerings(
            config, index, mesh, functools.partial(compile_xla, attention=config.model.attention)
        ):
            try:
                memory = lowered.compile().memory_analysis()
            except jax.errors.JaxRuntimeError as error:
                raise UserError(
                    f"phase {config.training.phases[index].name}, program {name}: XLA:TPU refuses it for "
                    f"{topology}: {str(error).splitlines()[0]}"
                ) from error
            programs[name] = ProgramBytes(
                memory.argument_size_in_bytes, memory.argument_size_in_bytes + beyond_arguments(memory)
            )
        measured.append(Measured(programs))
    return measured


def beyond_arguments(memory: Any) -> int:
    """Bytes that a compiled program needs beside its arguments, from its `memory_analysis()`."""
    return memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def faults_of(text: str, config: Config, phase: int, mesh: Mesh) -> list[str]:
    """What a compiled program of a phase must not hold or exchange, in words."""
    where = config.training.phases[phase]
    tokens, patches = where.sequence_length, where.patches_per_row
    long = {tokens, patches} - {None}
    faults = []
    squares = {
        shape
        for shape in map(_shape, re.findall(r"= \w+\[([\d,]+)\]", text))
        if any(shape.count(size) > 1 for size in long)
    }
    faults += [f"an array of scores: {shape}" for shape in sorted(squares)]
    if mesh.shape["tensor"] == 1:
        for one in exchanges(text):
            if one.is_float and len(one.shape) > 2 and long & set(one.shape) and one.kind != "all-to-all":
                faults.append(f"activations are exchanged: {one}")
    return faults


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def page(results: Sequence[Compiled]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| Recipe, phase | Depth | Chips | Mesh | State and batch, GiB | Temporaries, GiB | Exchanges in the "
        "text of the program | Kernels | Compiled in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        config = loader.load(one.case.config, [*one.case.overrides])
        mesh = " x ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1)
        kinds = Counter(e.kind for e in one.exchanges)
        said = [
            f"{Path(one.case.config).stem}, {config.training.phases[one.case.phase].name}",
            one.case.depth,
            one.case.topology,
            mesh,
        ]
        if one.refused:
            lines.append(f"| {' | '.join(said)} | | refused: {one.refused} | | | |")
            continue
        kernels = one.calls["tpu_custom_call"]
        said += [
            f"{one.arguments / GIB:.2f}",
            f"{one.temporaries / GIB:.2f}",
            ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
            f"{kernels}",
            f"{one.seconds:.0f} s",
        ]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- written by make aot -->\n", "<!-- end -->\n"


def write(path: Path, results: Sequence[Compiled]) -> None:
    """Put the table between the page's marks; a page without marks becomes the table alone."""
    text = path.read_text() if path.exists() else BEGIN + END
    if BEGIN not in text or END not in text:
        text = BEGIN + END
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + BEGIN + page(results) + END + after)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every case compiled and nothing is in it that must not be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="full depth, by hand")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--page", type=Path, help="Markdown page that takes the table")
    args = parser.parse_args(arguments)
    cases = FULL if args.full else EVERYDAY
    results = []
    for number in args.only if args.only is not None else range(len(cases)):
        for one in compile_case(cases[number]):
            results.append(one)
            print(page([one]).splitlines()[-1], *(f"  FAULT: {fault}" for fault in one.faults), sep="\n", flush=True)
            if args.page:
                write(args.page, results)
    return 1 if any(one.faults for one in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
