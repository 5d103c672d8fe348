"""JAX's own tests through the bridge: ``python -m tests.bridge.jax_tests <folder of jax's tests> [module ...]``.

The tests are those of jax's source release of the installed version; none of them is part of this project. Wherever one
compares a compiled function with an uncompiled one (`JaxTestCase._CompileAndCheck`), the function is also compiled by
the bridge, called three times, and each call compared with XLA by the tolerance that the test gives. Writes a table:
passed, refused by reason, wrong, crashed.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import random
import re
import sys
import unittest
from typing import Any

MODULES = ("lax_test", "lax_numpy_test", "lax_numpy_indexing_test", "lax_numpy_reducers_test", "lax_numpy_operators_test", "lax_numpy_ufuncs_test",
           "lax_control_flow_test", "lax_scipy_test", "linalg_test", "fft_test", "nn_test", "random_test", "dtypes_test", "ann_test")  # fmt: skip


class Record:
    """What came of each comparison."""

    def __init__(self) -> None:
        self.count: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.reasons: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    def add(self, module: str, outcome: str, note: str = "") -> None:
        self.count[module][outcome] += 1
        if outcome == "refused":
            self.reasons[note] += 1
        elif outcome != "passed":
            self.faults.append(f"{outcome}: {note}")

    def page(self, versions: str, share: str) -> str:
        """The table as Markdown."""
        outcomes = ("passed", "refused", "wrong", "crashed")
        total = collections.Counter()
        lines = ["# JAX's own tests through the bridge", "", f"{versions}, one process on torch CPU, {share}; made by `make jax-tests`.", "",
                 "| Module | Comparisons | " + " | ".join(o.capitalize() for o in outcomes) + " |", "|---|---|---|---|---|---|"]  # fmt: skip
        for module, found in sorted(self.count.items()):
            total.update(found)
            lines.append(f"| {module} | {found.total()} | " + " | ".join(str(found[o]) for o in outcomes) + " |")
        share_passed = 100 * total["passed"] / max(total.total(), 1)
        lines.append(
            f"| **all** | {total.total()} | {total['passed']} ({share_passed:.1f} %) | "
            + " | ".join(str(total[o]) for o in outcomes[1:])
            + " |"
        )
        lines += [
            "",
            "Refused:",
            "",
            *[f"* {n}: {reason}" for reason, n in self.reasons.most_common()],
            "",
            "Wrong and crashed:",
            "",
        ]
        return "\n".join([*lines, *(f"* {fault}" for fault in sorted(set(self.faults)) or ["none"])]) + "\n"


def _compare(case: Any, fun: Any, args_maker: Any, record: Record, tolerance: dict[str, Any]) -> None:
    import jax
    import numpy as np

    import npu_bridge
    from npu_bridge.errors import BridgeError

    name = f"{type(case).__module__}.{type(case).__name__}.{case._testMethodName}"
    module = name.split(".", 1)[0]
    args = args_maker()
    want = jax.tree.map(np.asarray, jax.jit(fun)(*args))
    try:
        run = npu_bridge.jit(fun)
        found = [jax.tree.map(np.asarray, run(*args)) for _ in range(3)]
    except BridgeError as error:
        reason = str(error).splitlines()[-1]
        record.add(module, "refused", re.sub(r" at .*?: ", ": ", re.sub(r"^\s*\d+\. ", "", reason))[:160])
        return
    except Exception as error:
        record.add(
            module,
            "crashed",
            f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
        )
        return
    for call, got in enumerate(found):
        try:
            case.assertAllClose(got, want, check_dtypes=True, **tolerance)
        except AssertionError as error:
            record.add(module, "wrong", f"{name}, call {call}: {' '.join(str(error).split())[:160]}")
            return
    record.add(module, "passed")


def _patched(record: Record) -> None:
    """Exchanges the comparison that all of jax's tests share."""
    from jax._src import test_util

    def compile_and_check(
        self, fun, args_maker, *, check_dtypes=True, tol=None, rtol=None, atol=None, check_cache_misses=True
    ):
        _compare(self, fun, args_maker, record, {"rtol": rtol or tol, "atol": atol or tol})

    test_util.JaxTestCase._CompileAndCheck = compile_and_check


def _tests(suite: unittest.TestSuite):
    for item in suite:
        yield from _tests(item) if isinstance(item, unittest.TestSuite) else [item]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bridge.jax_tests", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="tests/ of jax's source release")
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument(
        "--each", type=int, default=40, help="tests drawn of each module, the same ones every time; 0 takes all"
    )
    parser.add_argument("--page", type=pathlib.Path, help="where the table is written")
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        parser.error(
            f"{given.folder} is no folder; unpack tests/ of the jax source release of the installed version and name it"
        )
    sys.path.insert(0, str(given.folder))

    import jax
    import torch
    from absl import flags

    flags.FLAGS([sys.argv[0]])  # what jax's tests read of their command line
    record = Record()
    _patched(record)
    for module in given.modules:
        try:
            suite = list(_tests(unittest.defaultTestLoader.loadTestsFromName(module)))
        except (ImportError, AttributeError) as error:
            print(f"{module}: {error}", file=sys.stderr)
            continue
        chosen = suite if not given.each else random.Random(module).sample(suite, min(given.each, len(suite)))
        for test in chosen:
            test.run(unittest.TestResult())
        print(module, dict(record.count.get(module, {})), flush=True)
    page = record.page(
        f"jax {jax.__version__}, torch {torch.__version__}",
        f"{given.each} tests drawn of each module" if given.each else "every test",
    )
    print(page)
    if given.page:
        given.page.write_text(page)
    return int(any(found["wrong"] or found["crashed"] for found in record.count.values()))


if __name__ == "__main__":
    sys.exit(main())
