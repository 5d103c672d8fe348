"""`mindvl train`: train a configuration, or a model folder on a data file, through all phases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl train --config quickstart",
    "mindvl train --config my.yaml --set run.seed=3 training.phases[0].steps=50",
    "mindvl train --model Qwen2.5-VL-7B-Instruct --data my.json --run runs/mine --epochs 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_config(parser, required=False)
    direct = parser.add_argument_group("without a configuration (`mindvl init` writes it, then it is trained)")
    direct.add_argument("--model", metavar="DIR", help="model to start from: a Hugging Face folder or one of our runs")
    direct.add_argument("--data", metavar="FILE", help="samples in any format that training reads")
    direct.add_argument(
        "--media-root", metavar="DIR", help="folder that media paths start from; default: the folder of the file"
    )
    direct.add_argument("--run", dest="run_dir", metavar="DIR", help="run folder; default: runs/ and the data's name")
    direct.add_argument("--epochs", type=float, help="passes over the data; default: 3")


def run(args: argparse.Namespace) -> int:
    config = common.load_config(_config_file(args), args.set)
    common.prepare_data(config)
    common.load_slow("mindvl_jax.cli.run_hooks")
    from mindvl_jax.cli.run_hooks import train  # after the configuration is known to be good: this loads jax

    result = train(config)
    if result.finished:
        say_next(result.run_dir)
    return 0


def say_next(run_dir: Path) -> None:
    """Say on standard error what to do with a finished run."""
    print(
        f"next: mindvl generate --weights {run_dir} --image FILE --prompt TEXT\n"
        f"      mindvl evaluate --weights {run_dir} --tasks own=FILE\n"
        f"      mindvl export --weights {run_dir} --out DIR",
        file=sys.stderr,
    )


def _config_file(args: argparse.Namespace) -> str:
    direct = [name for name in ("model", "data", "media_root", "run_dir", "epochs") if getattr(args, name) is not None]
    if args.config is not None:
        if direct:
            raise UserError(
                f"--config says all of it; leave out --{direct[0].replace('_dir', '').replace('_', '-')}, or "
                "leave out --config"
            )
        return args.config
    if args.model is None or args.data is None:
        raise UserError("give --config YAML, or --model DIR and --data FILE")
    from mindvl_jax.cli.init import Request, write

    run_dir = Path(args.run_dir or f"runs/{Path(args.data).stem}")
    out = run_dir / "init.yaml"
    if not out.is_file():  # a run that goes on keeps its sizes
        write(
            Request(args.model, args.data, media_root=args.media_root, run_dir=str(run_dir), epochs=args.epochs or 3.0),
            out,
        )
    return str(out)
