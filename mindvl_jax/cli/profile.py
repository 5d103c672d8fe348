"""`mindvl profile`: where the time of a training step goes, by block of the model.

  mindvl profile --config C --steps 10..12     trains up to step 12 in a folder of its own and profiles steps 10 to 12
  mindvl profile --run DIR --steps 3           asks the run that trains in DIR to profile its next three steps

On either back end; docs/profile.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import fcntl
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
        "--out", help="run folder for --config; default: the configuration's run.dir with -profile at its end"
    )


def run(args: argparse.Namespace) -> int:
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
