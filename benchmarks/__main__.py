"""Measure this project against the alternatives.

    python -m benchmarks list
    python -m benchmarks run [--suite cpu|gpu|npu-emulated] [--quick] [--one-core] [--only CASE,...] [--out DIR]
    python -m benchmarks compare A.json B.json

Each case runs in its own process, with the same number of threads for every side. A run prints a table and writes a
dated JSON file and an HTML page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks import machine, page, results
from benchmarks.registry import CASES, SUITES, Case, Settings, load_cases
from mindvl_jax.core.host_memory import TUNABLES

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--suite", choices=SUITES, default="cpu")
    run.add_argument("--only", help="cases, separated by commas")
    run.add_argument("--quick", action="store_true", help="fewer rounds")
    run.add_argument("--dry", action="store_true", help="smallest shapes: does it start? The figures mean nothing")
    run.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every side (default: %(default)s)"
    )
    run.add_argument(
        "--one-core",
        action="store_true",
        help="one thread a side, by processor time: for a machine that others use too",
    )
    run.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file and the page")
    compare = commands.add_parser("compare", help="two results beside each other")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    one = commands.add_parser("case")  # what `run` starts
    one.add_argument("name")
    one.add_argument("settings")
    one.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)  # a pipe has no width of its own
    if args.command == "case":
        return _case(args.name, Settings(**json.loads(args.settings)), args.out)
    load_cases()
    if args.command == "list":
        console.print(results.case_table(CASES.values()))
        return 0
    try:
        if args.command == "compare":
            console.print(results.compare_table(results.read(args.before), results.read(args.after)))
            return 0
        chosen = _choose(args.suite, args.only)
    except results.Unusable as error:
        console.print(f"[red]{error}", highlight=False)
        return 2
    return _run(console, args, chosen)


def _choose(suite: str, only: str | None) -> list[Case]:
    there = {name: entry for name, entry in CASES.items() if entry.suite == suite}
    if only is None:
        return list(there.values())
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise results.Unusable(
            f"--only {only}: suite {suite} has no {', '.join(unknown) or 'case of no name'}; it has "
            f"{', '.join(there) or 'none'}"
        )
    return [there[name] for name in names]


def _run(console: Console, args: argparse.Namespace, chosen: list[Case]) -> int:
    settings = (
        Settings.smallest()
        if args.dry
        else dataclasses.replace(
            Settings.quick() if args.quick else Settings(),
            threads=1 if args.one_core else args.threads,
            one_core=args.one_core,
        )
    )
    record = dict(
        machine=machine.describe(settings.threads), suite=args.suite, settings=dataclasses.asdict(settings), cases={}
    )
    environment = dict(os.environ)
    environment.setdefault(
        "GLIBC_TUNABLES", TUNABLES
    )  # as train.py sets it; every side of a comparison runs in one process and has it
    environment.pop("XLA_FLAGS", None)  # virtual devices would share the threads that a figure is for
    if args.suite != "gpu" or args.dry:
        environment["JAX_PLATFORMS"] = "cpu"
    for entry in chosen:
        console.print(f"[bold]{entry.name}[/]: {entry.summary}", highlight=False)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.jsonl"
            command = [sys.executable, "-m", "benchmarks", "case", entry.name, json.dumps(record["settings"]), str(out)]
            code = subprocess.run(command, env=environment, cwd=HERE.parent, stdout=sys.stderr).returncode
            # What was measured before a case broke is kept, and the break is recorded beside it.
            comparisons = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        record["cases"][entry.name] = dict(
            summary=entry.summary, comparisons=comparisons, seconds=time.perf_counter() - start, failed=code != 0
        )
        console.print(results.case_results_table(entry.name, record["cases"][entry.name]))
    json_path, page_path = page.write(record, args.out)
    console.print(f"{json_path}\n{page_path}", highlight=False)
    failed = [name for name, outcome in record["cases"].items() if outcome["failed"]]
    if failed:
        console.print(f"[red]broken: {', '.join(failed)}; what they said stands above", highlight=False)
    return 1 if failed else 0


def _case(name: str, settings: Settings, out: Path) -> int:
    machine.use_threads(settings.threads)
    from benchmarks.measure import measure

    entry = load_cases()[name]
    with out.open("w") as file:
        for comparison in entry.build(settings):
            if settings.one_core:
                comparison.clock = "cpu"
            file.write(json.dumps(measure(comparison, seconds=settings.seconds, least=settings.least)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
