"""The console command `mindvl`. Each subcommand lives beside what it does and is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Sequence

from mindvl_jax import __version__
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.host_memory import relaunch_with_large_pages

# name -> (module with add_arguments(parser) and run(args) -> exit code, help)
COMMANDS = {
    "config": ("mindvl_jax.cli.config", "check a configuration, print it resolved, or print its JSON schema"),
    "data": ("mindvl_jax.cli.data", "check or convert training data"),
    "generate": ("mindvl_jax.cli.generate", "answer prompts about pictures"),
    "evaluate": ("mindvl_jax.cli.evaluate", "score a model on tasks"),
    "average": ("mindvl_jax.cli.average", "average the weights of checkpoints"),
    "export": ("mindvl_jax.cli.export", "write a run as a Hugging Face folder"),
    "score": ("mindvl_jax.cli.score", "negative log-likelihood of answers, sample by sample"),
    "parity": ("mindvl_jax.cli.parity", "compare a folder's model with transformers"),
    "plan": ("mindvl_jax.cli.plan", "whether a run fits its devices, before it starts and on any machine"),
    "profile": ("mindvl_jax.cli.profile", "where the time of a training step goes, by block of the model"),
    "compare": ("mindvl_jax.cli.compare", "train two configurations from one seed and compare their losses"),
    "doctor": ("mindvl_jax.cli.doctor", "is this machine fit to train through the bridge: host, network, operators, collectives, a golden training"),
}

COMPUTING = ("generate", "evaluate", "score", "compare", "profile")  # these run models for longer than a relaunch takes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Exit code 2 with one clear message for what the user can mend."""
    from_shell = argv is None
    argv = list(sys.argv[1:] if from_shell else argv)
    parser = argparse.ArgumentParser(prog="mindvl", description="MindVL: train, use and check native-resolution vision-language models.")
    parser.add_argument("--version", action="version", version=f"mindvl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if from_shell and chosen in COMPUTING:
        relaunch_with_large_pages()
    for name, (module, help_text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        if name == chosen:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"mindvl {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
