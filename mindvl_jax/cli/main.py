"""The console command `mindvl`. Each subcommand lives in a module of its own and is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mindvl_jax import __version__
from mindvl_jax.core.compiled import share_compiled_programs
from mindvl_jax.core.errors import UserError, printable, shortened
from mindvl_jax.core.host_memory import relaunch_with_large_pages

# name -> (module with add_arguments(parser) and run(args) -> exit code, help)
COMMANDS = {
    "init": ("mindvl_jax.cli.init", "write a configuration for a model folder and a data file"),
    "train": ("mindvl_jax.cli.train", "train a configuration; an interrupted run continues by itself"),
    "config": ("mindvl_jax.cli.config", "check a configuration, print it resolved, or print its JSON schema"),
    "data": ("mindvl_jax.cli.data", "check or convert training data"),
    "generate": ("mindvl_jax.cli.generate", "answer prompts about images"),
    "imagine": ("mindvl_jax.cli.imagine", "draw pictures from prompts"),
    "evaluate": ("mindvl_jax.cli.evaluate", "score a model on tasks"),
    "average": ("mindvl_jax.cli.average", "average the weights of checkpoints"),
    "merge": ("mindvl_jax.cli.merge", "fold a LoRA or DoRA adapter into its base and check the logits"),
    "convert": ("mindvl_jax.cli.convert", "weights to and from the layouts of MindSpeed-MM, and from NF4 to plain"),
    "import": ("mindvl_jax.cli.import_run", "a training recipe of MindSpeed-MM as our configuration"),
    "export": ("mindvl_jax.cli.export", "write a run as a Hugging Face folder"),
    "serve": ("mindvl_jax.cli.serve", "answer over HTTP with the OpenAI interface, and a page to try it"),
    "bench": ("mindvl_jax.cli.bench", "load on a server: time to first token, between tokens, throughput"),
    "score": ("mindvl_jax.cli.score", "negative log-likelihood of answers, sample by sample"),
    "metrics": ("mindvl_jax.cli.metrics", "the numbers of a run as CSV or JSON"),
    "replay": ("mindvl_jax.cli.replay", "run a step again that was not finite, and name the layer"),
    "parity": ("mindvl_jax.cli.parity", "compare a folder's model with transformers"),
    "plan": ("mindvl_jax.cli.plan", "whether a run fits its devices, before it starts and on any machine"),
    "profile": ("mindvl_jax.cli.profile", "where the time of a training step goes, by block of the model"),
    "compare": ("mindvl_jax.cli.compare", "train two configurations from one seed and compare their losses"),
    "doctor": (
        "mindvl_jax.cli.doctor",
        "is this machine fit to train through the bridge: host, network, operators, collectives, a golden training",
    ),
    "completion": ("mindvl_jax.cli.completion", "print the completion script of a shell"),
}

COMPUTING = (
    "train",
    "generate",
    "imagine",
    "evaluate",
    "serve",
    "score",
    "compare",
    "profile",
)  # these run models for longer than a relaunch takes

EXIT_CODES = """exit codes:
  0  done
  1  done, and the answer is no: a comparison differs, a plan does not fit, samples were unusable with --strict
  2  nothing was done, or not all of it: the message says what to change
  130  interrupted"""


class _Parser(argparse.ArgumentParser):
    """Keep the lines of an epilog, and name the nearest command or option for an unknown one."""

    def __init__(self, **options):
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._given: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}{self._nearest(message)}\n")

    def _nearest(self, message: str) -> str:
        import difflib

        known = []
        for action in self._actions:
            known += action.option_strings or map(str, action.choices or ())
        # A misspelt required option is reported as missing: the misspelling stands in what was given.
        missing = "are required" in message
        words = (
            [word for word in self._given if word.startswith("--")] if missing else message.replace("'", " ").split()
        )
        for word in (word.split("=")[0].rstrip(",") for word in words):
            near = [] if word in known else difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            if near:
                return f"; did you mean {near[0]}?"
        return ""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser with the arguments of one command: the modules of the others stay unloaded."""
    parser = _Parser(
        prog="mindvl",
        description="MindVL: train, use and check native-resolution vision-language models.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"mindvl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (module, help_text) in COMMANDS.items():
        command = importlib.import_module(module) if name == chosen else None
        subparser = commands.add_parser(
            name, help=help_text, description=help_text.capitalize() + ".", epilog=getattr(command, "EPILOG", None)
        )
        if command is not None:
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 2 with one clear message for what the user can change."""
    from_shell = argv is None
    argv = list(sys.argv[1:] if from_shell else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if from_shell and chosen in COMPUTING and not {"-h", "--help"} & set(argv):
        relaunch_with_large_pages()
    if from_shell:
        share_compiled_programs()
    parser = build_parser(chosen)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # by the command's own parser, which shows the command's usage
        subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        subparsers.choices[args.command].error(f"unknown arguments: {' '.join(unknown)}")
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"mindvl {args.command}: {printable(shortened(str(error), 20_000))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mindvl {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full or read-only disk, a file that went away
        print(
            printable(
                f"mindvl {args.command}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            ),
            file=sys.stderr,
        )
        return 2
    except MemoryError:
        print(f"mindvl {args.command}: out of memory; `mindvl plan` says what a configuration needs", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
