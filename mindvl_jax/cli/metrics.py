"""`mindvl metrics`: the numbers of a run as CSV or JSON, for a spreadsheet or a plot of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_jsonl

EPILOG = common.examples(
    "mindvl metrics runs/mine > metrics.csv",
    "mindvl metrics runs/mine --columns step loss validation_loss",
    "mindvl metrics runs/mine --json --last 1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="run folder")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="some columns; default: all")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N steps")
    parser.add_argument("--json", action="store_true", help="print a JSON list in place of CSV")


def run(args: argparse.Namespace) -> int:
    rows = read_jsonl(Path(args.run_dir) / "metrics.jsonl", whole=False)
    if not rows:
        raise UserError(f"{args.run_dir} has no metrics.jsonl with a step in it")
    if args.columns:
        known = dict.fromkeys(key for row in rows for key in row)
        if unknown := [name for name in args.columns if name not in known]:
            raise UserError(f"--columns {unknown[0]}: the run has {', '.join(known)}")
        rows = [{name: row.get(name) for name in args.columns} for row in rows]
    rows = rows[-args.last :] if args.last else rows
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        from mindvl_jax.training.loggers import write_csv

        write_csv(rows, sys.stdout)
    return 0
