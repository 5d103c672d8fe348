"""`mindvl config`: check a configuration, print it resolved, or print the JSON schema for editors."""

from __future__ import annotations

import argparse

from mindvl_jax.cli import common
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError

EPILOG = common.examples(
    "mindvl config my.yaml --set run.seed=3", "mindvl config --schema > mindvl.schema.json", "mindvl config --list"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="configuration to check and print with everything it extends resolved")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="dotted overrides")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a configuration")
    parser.add_argument("--json", action="store_true", help="print the configuration as JSON in place of YAML")
    parser.add_argument("--list", action="store_true", help="print the names of the packaged configurations")


def run(args: argparse.Namespace) -> int:
    if args.schema:
        print(config_loader.json_schema())
    elif args.list:
        print("\n".join(config_loader.packaged_names()))
    elif args.file:
        config = common.load_config(args.file, args.set)
        print(config.model_dump_json(indent=2) + "\n" if args.json else config_loader.dump(config), end="")
    else:
        raise UserError("name a configuration file, or ask for --schema or --list")
    return 0
