"""`mindvl replay`: run a step again whose loss or gradient was not finite, and name the layer that made it so."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples("mindvl replay runs/mine", "mindvl replay runs/mine --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="run folder with a bad_step.json")
    parser.add_argument("--json", action="store_true", help="print the finding as JSON")


def run(args: argparse.Namespace) -> int:
    run_dir = Path(args.run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run folder: it holds no config.yaml")
    config = common.load_config(str(run_dir / "config.yaml"))
    from mindvl_jax.training.replay import replay

    with common.busy("running the step again, operation by operation where it is not finite"):
        found = replay(run_dir, config)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    print(f"step {found.step} ({found.phase}), loss {found.loss:g}, samples {', '.join(found.sample_ids[:20])}")
    print(f"parameters: {found.parameters}")
    if found.bad_parameters:
        print(
            f"{len(found.bad_parameters)} parameters were not finite before the step: "
            f"{', '.join(found.bad_parameters[:5])}"
        )
    if found.finding is None:
        print("nothing is out of range with these parameters and samples")
    else:
        finding, largest = found.finding, ", ".join(f"{value:.3g}" for value in found.finding.inputs)
        print(
            f"first result that is not finite: {finding.operation} in {finding.scope}, "
            f"{'backward' if finding.backward else 'forward'} pass ({finding.source}); largest inputs "
            f"{largest}"
        )
    return 0
