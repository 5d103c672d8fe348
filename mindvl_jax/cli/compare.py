"""`mindvl compare`: two trainings from the same weights, loss by loss.

Configurations, commits, meshes or back ends may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mindvl_jax.cli import common
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError, at_least_one

# What a child process runs: the trainer of whichever tree PYTHONPATH names, on a resolved configuration.
_CHILD = (
    "import sys; from mindvl_jax.config.loader import load; from mindvl_jax.training.trainer import train; "
    "train(load(sys.argv[1]))\n"
)


EPILOG = common.examples(
    "mindvl compare --a smoke --set-b mesh.fsdp=4 --devices-b 4 --steps 10",
    "mindvl compare --a my.yaml --commit-a main --commit-b HEAD --steps 20 --out compared",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--a", required=True, metavar="YAML", help="first configuration")
    parser.add_argument("--b", metavar="YAML", help="second configuration; default: the first")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of both")
    for side in "ab":
        parser.add_argument(
            f"--set-{side}",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help=f"overrides of {side}, for example mesh.fsdp=4",
        )
        parser.add_argument(f"--commit-{side}", metavar="REVISION", help=f"run {side} with the code of this revision")
        parser.add_argument(f"--devices-{side}", type=int, metavar="N", help=f"host devices of {side} on CPU")
        parser.add_argument(
            f"--processes-{side}",
            type=int,
            default=1,
            metavar="N",
            help=f"processes of {side}, one a place of its mesh (backend npu_bridge)",
        )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, through the phases in order")
    parser.add_argument(
        "--start",
        metavar="DIR",
        help="weights that both start from; default: fresh ones of the first configuration's seed",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative difference of any step's loss that passes"
    )
    parser.add_argument(
        "--json", action="store_true", help="print compare.json; everything else goes to standard error"
    )
    parser.add_argument(
        "--out",
        default="compare",
        metavar="DIR",
        help="folder for both runs, compare.json and compare.png; must be empty or absent",
    )


def run(args: argparse.Namespace) -> int:
    out = Path(args.out).absolute()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name another folder, or remove it")
    at_least_one(args, "steps")
    configs = {
        side: common.load_config(path, [*args.set, *own])
        for side, path, own in (("a", args.a, args.set_a), ("b", args.b or args.a, args.set_b))
    }
    for config in configs.values():
        common.prepare_data(config)
    from mindvl_jax.models.loading import resolve_epochs

    out.mkdir(parents=True, exist_ok=True)
    configs = {side: resolve_epochs(config) for side, config in configs.items()}
    start = args.start or configs["a"].run.init_from or fresh_weights(configs["a"], out / "start")
    losses = {}
    for side, config in configs.items():
        folder = out / side
        path = out / f"{side}.yaml"
        revision = getattr(args, f"commit_{side}")
        path.write_text(
            written(shortened(config, steps=args.steps, start=str(start), folder=str(folder)), whole=revision is None),
            encoding="utf-8",
        )
        with contextlib.ExitStack() as stack, code_of(revision) as root:
            stack.enter_context(common.busy(f"training {side}, log in {out / f'{side}.log'}"))
            train_apart(
                f"run {side}",
                path,
                root,
                out / f"{side}.log",
                devices=getattr(args, f"devices_{side}"),
                processes=getattr(args, f"processes_{side}"),
            )
        losses[side] = read_losses(folder / "metrics.jsonl", args.steps)
    outcome = compare(losses["a"], losses["b"], args.tolerance, parameter_distance(out / "a", out / "b"))
    record = json.dumps(dataclasses.asdict(outcome) | {"passed": outcome.passed}, indent=2)
    (out / "compare.json").write_text(record + "\n")
    _draw(outcome, out / "compare.png")
    _show(outcome, out, stderr=args.json)
    if args.json:
        print(record)
    return 0 if outcome.passed else 1


def written(config: Config, *, whole: bool) -> str:
    """The configuration as YAML.

    For other code only what somebody set: that code may lack a key of today, and has its own defaults.
    """
    return (
        config_loader.dump(config)
        if whole
        else yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    )


def shortened(config: Config, *, steps: int, start: str, folder: str) -> Config:
    """The configuration cut to its first `steps` optimizer steps, starting from `start`; no evaluation, one checkpoint
    at the end.
    """
    phases, left = [], steps
    for phase in config.training.phases:
        if left <= 0:
            break
        count = min(phase.steps, left)
        phases.append(phase.model_copy(update=dict(steps=count, warmup_steps=min(phase.warmup_steps, count))))
        left -= count
    if left > 0:
        raise UserError(f"--steps {steps} is more than the {steps - left} steps of the configuration's phases")
    return config.model_copy(
        update=dict(
            run=config.run.model_copy(update=dict(dir=folder, init_from=start, resume="never")),
            training=config.training.model_copy(update=dict(phases=tuple(phases))),
            evaluation=config.evaluation.model_copy(update=dict(tasks=())),
            checkpoint=config.checkpoint.model_copy(update=dict(every_steps=steps, keep=1)),
            logging=config.logging.model_copy(update=dict(tensorboard=False, every_steps=1)),
        )
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Losses of both by step, their relative differences |a - b| / max(|a|, |b|), and the distance of the final
    parameters.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    relative: tuple[float, ...]
    tolerance: float
    parameters: float | None = None

    @property
    def worst(self) -> int:
        """Index of the step that differs most; a loss that is no number differs most of all."""
        return max(
            range(len(self.relative)),
            key=lambda step: math.inf if math.isnan(self.relative[step]) else self.relative[step],
        )

    @property
    def passed(self) -> bool:
        return all(value <= self.tolerance for value in self.relative)  # False for NaN


def compare(a: Sequence[float], b: Sequence[float], tolerance: float, parameters: float | None = None) -> Comparison:
    """Compare two runs of as many steps. Losses alone decide; the parameters' distance is told beside them."""
    relative = tuple(
        0.0 if one == other else abs(one - other) / max(abs(one), abs(other)) for one, other in zip(a, b, strict=True)
    )
    return Comparison(tuple(a), tuple(b), relative, tolerance, parameters)


def parameter_distance(a: Path, b: Path) -> float:
    """L2 distance of the newest parameters of two run folders over the length of those of `b`, in float64."""
    import numpy as np

    from mindvl_jax.checkpoints.checkpoint import load_params

    mine, other = (
        {path: np.asarray(value, np.float64) for path, value in load_params(folder)[1].items()} for folder in (a, b)
    )
    squares = [(float(np.sum((mine[path] - value) ** 2)), float(np.sum(value**2))) for path, value in other.items()]
    return math.sqrt(sum(apart for apart, _ in squares) / sum(length for _, length in squares))


def read_losses(path: Path, steps: int) -> list[float]:
    """The loss of every step of a run.

    Raises:
      UserError: a step is missing.
    """
    found: dict[int, float] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            record: dict[str, Any] = json.loads(line)
            if "loss" in record and "step" in record:
                found[record["step"]] = math.nan if record["loss"] is None else float(record["loss"])
    ordered = [found[step] for step in sorted(found)]
    if len(ordered) != steps:
        raise UserError(f"{path}: holds the loss of {len(ordered)} steps, expected {steps}; see the log beside the run")
    return ordered


def fresh_weights(config: Config, folder: Path) -> Path:
    """The first configuration's own initial weights as a folder, so that both runs read the same file whatever their
    code.
    """
    import jax

    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.weights import save_parameters

    save_parameters(folder, config.model, jax.jit(outline_of(config.model).initial)(jax.random.key(config.run.seed)))
    return folder


@contextlib.contextmanager
def code_of(revision: str | None) -> Iterator[Path]:
    """Root of the code: ours, or a temporary work tree of a revision."""
    home = Path(__file__).resolve().parents[2]
    if revision is None:
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="mindvl-compare-") as scratch:
        tree = Path(scratch) / "tree"
        made = subprocess.run(
            ["git", "-C", str(home), "worktree", "add", "--detach", str(tree), revision], capture_output=True, text=True
        )
        if made.returncode:
            raise UserError(f"revision {revision!r} cannot be checked out beside {home}: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(home), "worktree", "remove", "--force", str(tree)], capture_output=True)


def train_apart(
    name: str, config: Path, root: Path, log: Path, *, devices: int | None = None, processes: int = 1
) -> None:
    """Train by a resolved configuration in processes of its own, with the code of `root`.

    Args:
      devices: host devices of one process on the CPU (backend xla). processes: started by npu_bridge.launch when more
        than one.

    Raises:
      UserError: it failed; the end of its log is in the message.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH")])])
    if devices is not None:
        environment["XLA_FLAGS"] = (
            f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        environment["JAX_PLATFORMS"] = "cpu"
    with log.open("w", encoding="utf-8") as sink, tempfile.TemporaryDirectory(prefix="mindvl-compare-") as scratch:
        script = Path(scratch) / "child.py"
        script.write_text(_CHILD)
        launcher = [] if processes == 1 else ["-m", "npu_bridge.launch", "--nproc", str(processes)]
        code = subprocess.run(
            [sys.executable, *launcher, str(script), str(config)],
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise UserError(f"{name} ended with exit code {code}; the end of {log}:\n{tail}")


def _show(outcome: Comparison, out: Path, *, stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="loss by step")
    for title in ("step", "a", "b", "relative difference"):
        table.add_column(title, justify="right")
    for step, (one, other, relative) in enumerate(zip(outcome.a, outcome.b, outcome.relative), 1):
        style = None if relative <= outcome.tolerance else "red"
        table.add_row(str(step), f"{one:.7g}", f"{other:.7g}", f"{relative:.2e}", style=style)
    console = Console(stderr=stderr)
    console.print(table)
    verdict = "[green]equal[/]" if outcome.passed else "[red]different[/]"
    console.print(
        f"{verdict}: largest relative difference {outcome.relative[outcome.worst]:.2e} at step "
        f"{outcome.worst + 1} (tolerance {outcome.tolerance:g})"
    )
    console.print(
        f"parameters after the last step differ by {outcome.parameters:.2e} (L2, relative); {out / 'compare.png'}"
    )


def _draw(outcome: Comparison, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = range(1, len(outcome.a) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    top.plot(steps, outcome.a, label="a", linewidth=2.5, alpha=0.6)
    top.plot(steps, outcome.b, label="b", linewidth=1, linestyle="--", color="black")
    top.set(ylabel="loss")
    top.legend()
    bottom.plot(steps, [max(value, 1e-9) for value in outcome.relative], marker="o", markersize=3)
    bottom.axhline(outcome.tolerance, color="red", linewidth=0.8, linestyle=":", label="tolerance")
    bottom.set(yscale="log", xlabel="step", ylabel="relative difference")
    bottom.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
