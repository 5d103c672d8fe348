"""Write the stand-ins: `python -m examples.quickstart.standins.build --out data/standins`.

Into the folder go lmms-eval's parquet files, into its `tsv/` VLMEvalKit's; `standins.json` in both says that these are
not the benchmarks, and marks every score and page made from them. The same call gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.standins.sets import STANDINS
from examples.quickstart.standins.writing import write_parquet, write_tsv
from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.benchmarks import STANDINS_MARK


def build(out: Path, tasks: Sequence[str] | None = None) -> dict[str, int]:
    """Write both forms of each stand-in and return the number of questions by task.

    Args:
      tasks: names of `mindvl evaluate --tasks`; None is all eight.

    Raises:
      UserError: an unknown task, or the package with easy-VQA's images is missing.
    """
    known = [standin.task for standin in STANDINS]
    if unknown := [task for task in tasks or () if task not in known]:
        raise UserError(f"there is no stand-in for {', '.join(unknown)}; there are {', '.join(known)}")
    (out / "tsv").mkdir(parents=True, exist_ok=True)
    counts = {}
    for standin in STANDINS:
        if tasks is not None and standin.task not in tasks:
            continue
        rows = list(standin.make(random.Random(f"stand-in/{standin.task}"), standin.count))
        write_parquet(out / f"{standin.parquet}.parquet", [published for published, _ in rows])
        write_tsv(out / "tsv" / f"{standin.tsv}.tsv", [published for _, published in rows])
        counts[standin.task] = len(rows)
    note = {
        "what": "Stand-ins built from packaged data with the benchmarks' columns and metrics. They are not the "
        "benchmarks; their scores compare with nothing published.",
        "material": "the held-out side of the quickstart's material: see ATTRIBUTIONS.md for its licences",
        "questions": counts,
        "about": {standin.task: standin.about for standin in STANDINS if standin.task in counts},
    }
    for folder in (out, out / "tsv"):
        (folder / STANDINS_MARK).write_text(json.dumps(note, indent=1) + "\n")
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.standins.build", description="Writes the stand-in benchmark sets."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/standins"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--tasks", help="comma list; default: all")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        counts = build(options.out, options.tasks.split(",") if options.tasks else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: stand-ins of {len(counts)} benchmarks, {sum(counts.values())} questions, "
        f"{time.monotonic() - began:.1f} s (tsv/ holds the same as VLMEvalKit files)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
