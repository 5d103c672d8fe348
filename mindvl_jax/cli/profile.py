"""`mindvl profile`: where the time of a training step goes, by block of the model.

  mindvl profile --config C --steps 10..12     trains up to step 12 in a folder of its own and profiles steps 10 to 12
  mindvl profile --run DIR --steps 3           asks the run that trains in DIR to profile its next three steps
  mindvl profile --config C --aot v5p:4x4x4    predicts it for a machine that is not here, from the compiled program

On either back end (the last on XLA alone); docs/profile.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl profile --config quickstart --steps 10..12", "mindvl profile --run runs/mine --steps 3"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="train this configuration up to the last of --steps and profile those")
    # Not `run`: the command line keeps the command's function under that name.
    which.add_argument("--run", dest="asked", metavar="DIR", help="a run that is training now")
    parser.add_argument(
        "--steps",
        metavar="A..B or N",
        help="with --config: the steps A to B (default 4..6); with --run: how many (default 3)",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="dotted overrides, with --config"
    )
    parser.add_argument(
        "--aot",
        metavar="TOPOLOGY",
        help="with --config: compile the step for a machine such as v5p:4x4x4 or h100:1x1x8, as `mindvl plan --compile"
        "` does, and print what it will do by block; minutes a phase",
    )
    parser.add_argument("--phase", metavar="NAME", help="with --aot: the phase (default: the first)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="with --aot: keep the compiled program's text")
    parser.add_argument(
        "--out", help="run folder for --config; default: the configuration's run.dir with -profile at its end"
    )


def run(args: argparse.Namespace) -> int:
    if args.aot is not None:
        if args.asked or args.steps or args.out:
            raise UserError("--aot predicts steps of --config; it goes with neither --run nor --steps nor --out")
        return predict(args)
    if args.phase or args.text:
        raise UserError("--phase and --text go with --aot")
    if args.asked:
        from mindvl_jax.profiling.profiler import FOLDER, request

        require_training(Path(args.asked))
        path = request(Path(args.asked), _count(args.steps or "3"))
        print(
            f"asked by {path}; the run writes into {Path(args.asked) / FOLDER} and prints the table when the "
            "steps are done"
        )
        return 0
    first, last = _range(args.steps or "4..6")
    config = common.load_config(args.config, args.set)
    common.prepare_data(config)
    from mindvl_jax.models.loading import resolve_epochs

    total = sum(phase.steps for phase in resolve_epochs(config).training.phases)
    if last > total:
        raise UserError(f"--steps {first}..{last}: the configuration trains {total} steps")
    folder = args.out or f"{config.run.dir.rstrip('/')}-profile"
    config = common.load_config(args.config, [*args.set, f"run.dir={folder}", f"profile.steps=[{first},{last}]"])
    from mindvl_jax.cli.run_hooks import train

    result = train(config, stop_after=last)
    if result.step < first:
        raise UserError(f"the run stopped after step {result.step}, before step {first}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Print by block what the step of one phase does on a machine that is not here."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; an accelerator of this machine is left to whoever uses it
    from mindvl_jax.planning import topologies
    from mindvl_jax.planning.phase import planned_mesh
    from mindvl_jax.profiling import compiled as analysis

    kind = topologies.device_kind(args.aot)
    if kind not in analysis.MACHINES:
        raise UserError(f"--aot {args.aot}: bandwidth of {kind} is not known; known are {', '.join(analysis.MACHINES)}")
    config = common.load_config(args.config, args.set)
    if config.backend != "xla":
        raise UserError(f"--aot asks XLA, but backend is {config.backend}; add --set backend=xla")
    phases = [phase.name for phase in config.training.phases]
    if args.phase is not None and args.phase not in phases:
        raise UserError(f"--phase {args.phase!r}; the phases are {', '.join(phases)}")
    index = 0 if args.phase is None else phases.index(args.phase)
    devices = len(topologies.topology_devices(args.aot))
    config = config.model_copy(update=dict(mesh=planned_mesh(config.mesh, devices)))
    for name, program, seconds in topologies.compiled_programs(config, index, args.aot):
        if isinstance(program, str):
            raise UserError(f"phase {phases[index]}, program {name}: XLA refuses it for {args.aot}: {program}")
        text = program.as_text()
        if args.text:
            args.text.write_text(text)
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + topologies.beyond_arguments(memory)
        print(
            f"{phases[index]}, {name}, on one of {devices} x {kind}: {held / 2**30:.2f} GiB; "
            f"compiled in {seconds:.0f} s"
        )
        said = program.cost_analysis()
        totals = {key: said[key] for key in ("flops", "bytes accessed", "optimal_seconds") if key in said}
        print(analysis.table(analysis.Program(text), analysis.MACHINES[kind], totals))
    return 0


def require_training(run_dir: Path) -> None:
    """Refuse a run folder in which no process trains now: nobody would answer.

    A training process holds the folder's lock.

    Raises:
      UserError: no run there, or nothing trains in it.
    """
    lock = run_dir / ".lock"
    if lock.is_file():
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"nothing trains in {run_dir} now (on this machine); start it again, or profile its "
            f"configuration: mindvl profile --config {run_dir / 'config.yaml'}"
        )


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--steps {text!r}; expected A..B with 1 <= A <= B, for example 10..12")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--steps {text!r}; expected a number of steps with --run, for example 3")
    return int(text)
