"""Compile training steps with the real XLA:TPU and XLA:GPU, without a device: does it fit, what does it exchange, which
kernels does it call.

    python -m mindvl_jax.planning.aot --page docs/aot.md                 # the everyday cases: true widths, few layers
    python -m mindvl_jax.planning.aot --recipes v5p --page docs/aot.md   # by hand: full depth, minutes for each phase
    python -m mindvl_jax.planning.aot --recipes h100 --page docs/aot.md

Needs libtpu beside jax (`make aot` keeps an environment of its own for it) or jax's CUDA plugin; neither a driver nor a
device. Fails when the compiler gathers or sums a batch where only weights should move, holds a score matrix, or runs
out of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from mindvl_jax.config import loader
from mindvl_jax.config.schema import Config
from mindvl_jax.core.devices import GIB, limit_of
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.exchanges import Exchange, exchanges, per_layer
from mindvl_jax.parallel.mesh import ROW_AXES
from mindvl_jax.planning.phase import Measured, ProgramBytes
from mindvl_jax.planning.topologies import beyond_arguments, compiled_programs, device_kind, topology_mesh

MARGIN = 0.1  # of the memory, which `mindvl plan` too leaves to what no compiler counts


@dataclasses.dataclass(frozen=True)
class Case:
    """One phase of a recipe on one machine.

    Attributes:
      topology: see `planning.topologies`. phase: its number. overrides: of the configuration. depth: what is said of
        the depth on the page.
      layer: exchanges that one decoder layer may have at most, by (direction, kind); None: they are only told.
    """

    config: str
    topology: str
    phase: int
    overrides: tuple[str, ...] = ()
    depth: str = "full"
    layer: Mapping[tuple[str, str], int] | None = None


_CUT = ("model.text.num_layers=2", "model.vision.depth=2", "model.vision.fullatt_block_indexes=[1]")
_CUT_SAID = "2 decoder layers, 2 vision blocks"
_MINDVL, _QWEN = "configs/mindvl-8b.yaml", "configs/qwen2.5-vl-{}.yaml"
# The seven matrices of a layer, gathered forward and back; a TPU gathers those of q, k and v once more to recompute.
# Beside the gradients' scatters the scales of four norms are summed.
_FSDP = {
    ("forward", "all-gather"): 7,
    ("back", "all-gather"): 10,
    ("back", "reduce-scatter"): 7,
    ("back", "all-reduce"): 4,
}
# Everyday cases ask the compiler for less effort on the program's speed: it takes a third of the time. Exchanges and
# memory stay what they are.
_QUICK = "compiler_flags.exec_time_optimization_effort=-1.0"
EVERYDAY = (
    Case(_MINDVL, "v5p:2x2x1", 1, (*_CUT, _QUICK, "training.phases.1.rows=4"), f"{_CUT_SAID}, 1 row a chip", _FSDP),
)
# By hand. Rows follow the devices where the recipe has fewer.
RECIPES = {
    "mesh": (
        Case(
            _MINDVL,
            "v5p:2x2x1",
            1,
            (*_CUT, _QUICK, "training.phases.1.rows=2", "mesh.fsdp=2", "mesh.tensor=2"),
            f"{_CUT_SAID}, 1 row a group",
            # Sums over tensor: of the outputs of two blocks; back those recomputed, of input gradients, and of scales.
            _FSDP | {("forward", "all-reduce"): 2, ("back", "all-reduce"): 10},
        ),
        Case(
            _MINDVL,
            "v5p:2x2x1",
            1,
            (*_CUT, _QUICK, "training.phases.1.rows=4", "mesh.data=2", "mesh.fsdp=2"),
            f"{_CUT_SAID}, 1 row a chip",
            # Each scattered gradient is summed over data once.
            _FSDP | {("back", "all-reduce"): 4 + 7},
        ),
    ),
    "v5p": (
        *(Case(_MINDVL, "v5p:4x4x4", phase) for phase in range(3)),
        Case(_MINDVL, "v5p:4x4x4", 1, ("mesh.data=2", "mesh.fsdp=32")),
        Case(
            _MINDVL,
            "v5p:4x4x4",
            2,
            ("training.phases.2.sequence_length=32768", "training.phases.2.patches_per_row=98304"),
        ),
        Case(_MINDVL, "v5p:2x2x2", 1),
        Case(_MINDVL, "v5p:8x8x8", 1, ("training.phases.1.rows=512",)),
        *(Case(_QWEN.format(size), "v5p:2x2x2", 0) for size in ("3b", "7b")),
        *(Case(_QWEN.format(size), "v5p:4x4x4", 0, ("training.phases.0.rows=64",)) for size in ("32b", "72b")),
    ),
    "v6e": (Case(_MINDVL, "v6e:16x16", 1, ("training.phases.1.rows=256",)),),
    "h100": (
        Case(_QWEN.format("7b"), "h100:1x1x8", 0, _CUT, _CUT_SAID),
        *(Case(_QWEN.format(size), "h100:1x1x8", 0) for size in ("3b", "7b")),
        *(Case(_QWEN.format(size), "h100:1x8x8", 0, ("training.phases.0.rows=64",)) for size in ("32b", "72b")),
        Case(_MINDVL, "h100:1x8x8", 1),
    ),
    # Of each recipe the smallest machine that may hold it, and the next smaller one.
    "families": tuple(
        Case(f"configs/{name}.yaml", f"h100:1x1x{devices}", 0, ("mesh.data=1", f"mesh.fsdp={devices}"))
        for name, sizes in {
            "qwen2-vl-7b": (8, 4, 2),
            "qwen3-vl-8b": (8, 4, 2),
            "internvl3-8b": (8, 4, 2),
            "llava-1.5-7b": (4, 2, 1),
            "janus-pro-7b": (8, 4, 2),
            "qwen2.5-vl-7b": (4, 2),
            "qwen2.5-vl-3b": (4, 2, 1),
        }.items()
        for devices in sizes
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's memory plan of one program, for one device.

    Attributes:
      arguments, temporaries: bytes. calls: custom calls by target. seconds, processor_seconds: of compilation.
      faults: what must not be, in words.
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
    processor_seconds: float = 0.0


def compile_case(case: Case, keep: Path | None = None) -> list[Compiled]:
    """Compile every program of the case's phase and look for what must not be in it.

    Args:
      keep: folder for the texts of the programs.
    """
    config = loader.load(case.config, [*case.overrides])
    mesh = topology_mesh(config, case.topology)
    usable = limit_of(None, device_kind(case.topology), margin=MARGIN, backend="xla").usable
    found, spent = [], time.process_time()
    for name, compiled, seconds in compiled_programs(config, case.phase, case.topology):
        one = Compiled(case, name, dict(mesh.shape), seconds=seconds, processor_seconds=time.process_time() - spent)
        spent = time.process_time()
        if isinstance(compiled, str):
            found.append(dataclasses.replace(one, faults=[f"refused: {compiled}"]))
            continue
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            recipe = f"{Path(case.config).stem}-{case.phase}-{case.topology.replace(':', '-')}-{name}"
            (keep / f"{recipe}.txt").write_text(text)
        faults = faults_of(text, config, case.phase, mesh) + layer_faults(text, case)
        needs = memory.argument_size_in_bytes + beyond_arguments(memory)
        if needs > usable:
            faults.append(f"does not fit: {needs / GIB:.1f} GiB of {usable / GIB:.1f}")
        calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        sizes = dict(arguments=memory.argument_size_in_bytes, temporaries=beyond_arguments(memory))
        found.append(dataclasses.replace(one, exchanges=exchanges(text), calls=calls, faults=faults, **sizes))
    return found


def measure(config: Config, indexes: Sequence[int], topology: str) -> list[Measured]:
    """Measure the memory of these phases' programs on one device of a topology, by its own compiler; for
    `planning.phase.Planner`.

    Raises:
      UserError: the topology is unknown, or the compiler refuses a program; its words say how much memory is missing.
    """
    measured = []
    for index in indexes:
        programs = {}
        for name, compiled, _ in compiled_programs(config, index, topology):
            if isinstance(compiled, str):
                raise UserError(
                    f"phase {config.training.phases[index].name}, program {name}: XLA refuses it for {topology}: "
                    f"{compiled}"
                )
            memory = compiled.memory_analysis()
            arguments = memory.argument_size_in_bytes
            programs[name] = ProgramBytes(arguments, arguments + beyond_arguments(memory))
        measured.append(Measured(programs))
    return measured


def faults_of(text: str, config: Config, phase: int, mesh: Mesh | AbstractMesh) -> list[str]:
    """List forbidden arrays and collectives of a phase's compiled program.

    Of activations a mesh without tensor parallelism exchanges the embedding's columns for rows; with it, sums of a
    device's own rows, and of the embedding's columns.
    """
    where = config.training.phases[phase]
    tokens, patches = where.sequence_length, where.patches_per_row
    # A size that a parameter or a device's part of it has too (8,192 patches in a model of that width) tells nothing.
    sizes = {size for x in outline_of(config.model, config.adapters).shapes.values() for size in x.shape}
    long = {tokens, patches} - {None, *(size // parts for size in sizes for parts in mesh.shape.values())}
    faults = []
    squares = {
        shape
        for shape in map(_shape, re.findall(r"= \(?\w+\[([\d,]+)\]", text))
        if any(shape.count(size) > 1 for size in long)
    }
    faults += [f"an array of scores: {shape}" for shape in sorted(squares)]
    rows = where.rows // math.prod(mesh.shape[axis] for axis in ROW_AXES)
    for one in exchanges(text):
        if not one.is_float or len(one.shape) < 3 or not long & set(one.shape) or one.kind == "all-to-all":
            continue
        # The table of tokens is split by vocabulary too: its columns are summed over tensor before they become rows.
        columns = one.shape[-1] * mesh.shape["fsdp"] == config.model.text.hidden_size
        own = one.kind == "all-reduce" and (one.shape[0] == rows or columns)
        if mesh.shape["tensor"] == 1 or not own:
            faults.append(f"activations are exchanged: {one}")
    return faults


def layer_faults(text: str, case: Case) -> list[str]:
    """List decoder layers whose communication exceeds the case's limits."""
    if case.layer is None:
        return []
    return [
        f"a layer has {number} {kind} {direction}, expected at most {case.layer.get((direction, kind), 0)}"
        for direction, kinds in per_layer(exchanges(text)).items()
        for kind, number in kinds.items()
        if number > case.layer.get((direction, kind), 0)
    ]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


HEADER = (
    "| Recipe, phase | Depth | Devices | Mesh | Verdict | State and batch, GiB | Temporaries, GiB | Exchanges of a "
    "decoder layer | Exchanges of all kinds | Kernels | Compiled in (processor time) |\n|" + "---|" * 11 + "\n"
)


def row(one: Compiled) -> str:
    """One line of the page."""
    config = loader.load(one.case.config, [*one.case.overrides])
    name = f"{Path(one.case.config).stem}, {config.training.phases[one.case.phase].name}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1)
    changed = [x for x in one.case.overrides if x not in (*_CUT, _QUICK) and not x.startswith("mesh.")]
    kernels = sum(n for target, n in one.calls.items() if target in KERNELS)
    layer = "; ".join(
        f"{direction} {_kinds(kinds)}" for direction, kinds in per_layer([*one.exchanges]).items() if kinds
    )
    depth = one.case.depth + "".join(f", {x.rsplit('.', 1)[-1]}" for x in changed)
    said = [
        name if one.program == "train_step" else f"{name}, {one.program}",
        depth,
        one.case.topology,
        mesh,
        "; ".join(one.faults) or "fits",
        f"{one.arguments / GIB:.2f}",
        f"{one.temporaries / GIB:.2f}",
        layer or "-",
        _kinds(Counter(e.kind for e in one.exchanges)) or "-",
        str(kernels),
        f"{one.seconds:.0f} s ({one.processor_seconds:.0f} s)",
    ]
    return f"| {' | '.join(said)} |"


KERNELS = ("tpu_custom_call", "__cudnn$fmhaSoftmax", "__gpu$xla.gpu.triton")


def _kinds(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))


BEGIN, END = "<!-- written by make aot -->\n", "<!-- end -->\n"


def write(path: Path, results: Sequence[Compiled]) -> None:
    """Put lines of the table between the page's marks: a case that stands there is replaced, others stay."""
    text = path.read_text() if path.exists() else BEGIN + END
    if BEGIN not in text or END not in text:
        text = BEGIN + END
    before, old, after = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END)[0], text.split(END)[1]
    lines = {_key(line): line for line in old.splitlines()[2:]} if old.startswith(HEADER.splitlines()[0]) else {}
    lines |= {_key(row(one)): row(one) for one in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + BEGIN + HEADER + "".join(f"{line}\n" for line in lines.values()) + END + after)


def _key(line: str) -> tuple[str, ...]:
    """Recipe, depth, devices and mesh of a line."""
    return tuple(line.split(" | ")[:4])


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every case compiled and nothing is in it that must not be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", choices=[*RECIPES], help="by hand: these in place of the everyday cases")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--page", type=Path, help="Markdown page that takes the table")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the texts of the compiled programs")
    args = parser.parse_args(arguments)
    cases = EVERYDAY if args.recipes is None else RECIPES[args.recipes]
    failed = False
    for number in args.only if args.only is not None else range(len(cases)):
        for one in compile_case(cases[number], args.keep):
            failed |= bool(one.faults)
            print(row(one), *(f"  FAULT: {fault}" for fault in one.faults), sep="\n", flush=True)
            if args.page:
                write(args.page, [one])
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
