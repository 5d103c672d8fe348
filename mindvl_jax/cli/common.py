"""Options and steps that several commands share: one name for one thing."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from mindvl_jax.config import loader
from mindvl_jax.config.schema import ColumnMapping, Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.progress import LogConsole, working
from mindvl_jax.models.spec import Named
from mindvl_jax.weights.described import described

# `examples` is no part of the library: named, and imported only when a configuration asks for the quickstart.
PREPARE_QUICKSTART = Named("examples.quickstart.build:prepare")


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--config` and `--set`."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="YAML",
        help="configuration: a file, or a packaged one by name, such as quickstart",
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, which may be given several times."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="dotted overrides, for example run.seed=3 training.phases[0].steps=50",
    )


def examples(*lines: str) -> str:
    """Return an epilog of example calls."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def load_config(path: str, overrides: Sequence[str] | Iterable[str] = ()) -> Config:
    """Read a configuration as every command does, with sizes from the weights' folder where it names one."""
    return loader.load(path, overrides, describe=described)


def busy(what: str) -> AbstractContextManager[None]:
    """Say on standard error what takes long: a spinner on a terminal, lines in a pipe."""
    return working(LogConsole(stderr=True, stamp=False), what)


def load_slow(*modules: str) -> None:
    """Import what loads JAX, and say so: on a busy machine that alone takes long."""
    with busy("loading JAX"):
        for module in modules:
            importlib.import_module(module)


def prepare_data(config: Config) -> None:
    """Build the quickstart's data when the configuration asks for it and they are not there."""
    if config.data.quickstart:
        print(f"data: {config.data.quickstart.folder} (built once, which takes a minute or two)", file=sys.stderr)
        with busy("building the quickstart's data"):
            PREPARE_QUICKSTART(config.data.quickstart)


def pairs(args: argparse.Namespace, option: str) -> dict[str, str]:
    """Return NAME=VALUE arguments of an option as a mapping.

    Raises:
      UserError: one without `=`.
    """
    given = getattr(args, option, None) or ()
    if wrong := [pair for pair in given if "=" not in pair]:
        raise UserError(f"--{option.replace('_', '-')} {wrong[0]}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in given)


def columns_of(args: argparse.Namespace) -> ColumnMapping:
    """Return the columns that `--columns` names.

    Raises:
      UserError: a name that is none of the mapping's.
    """
    given = pairs(args, "columns")
    given = {{"image": "images", "video": "videos"}.get(name, name): column for name, column in given.items()}
    if unknown := [name for name in given if name not in ColumnMapping.model_fields]:
        raise UserError(f"--columns {unknown[0]}: unknown; valid are {', '.join(ColumnMapping.model_fields)}")
    return ColumnMapping(**given)
