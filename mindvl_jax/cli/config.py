"""`mindvl config`: check a configuration, print it resolved, or print the JSON schema for editors."""

from __future__ import annotations

import argparse

from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="configuration to check and print with everything it extends resolved")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="dotted overrides")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a configuration")


def run(args: argparse.Namespace) -> int:
    if args.schema:
        print(config_loader.json_schema())
    elif args.file:
        print(config_loader.dump(config_loader.load(args.file, args.set)), end="")
    else:
        raise UserError("name a configuration file, or ask for --schema")
    return 0
