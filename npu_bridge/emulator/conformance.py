"""Run tests/emulator/device in the emulator and write the results to docs/conformance.md (``make conformance``).

`python -m npu_bridge.emulator.conformance [--page FILE] [options of pytest]`
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from npu_bridge.emulator.build import build
from npu_bridge.emulator.environment import check
from npu_bridge.emulator.errors import EmulatorError

ROOT = Path(__file__).parents[2]
TESTS, PAGE = ROOT / "tests" / "emulator" / "device", ROOT / "docs" / "conformance.md"

TABLE = "table:"  # test properties with this prefix are tables, printed below the list of their file

HEAD = """# Conformance: the real torch_npu on an emulated CANN runtime

Written by `make conformance`; do not edit by hand. {versions}; {machine}; {date}.

A green line proves: the calls exist in this torch_npu with these arguments, its host code accepts them and allocates what is said, its autograd calls the gradient kernels shown, HCCL calls agree between ranks, a capture keeps the rules, and the
mathematics made of these calls is right if the formula of each kernel is. It does not prove how CANN's kernels round, that a chip takes these shapes, or any speed: kernels are computed by torch on the CPU.

**{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s.** Building the emulator before took {build_seconds:.0f} s (0 when it was in the cache).
"""


def read(path: Path) -> list[dict]:
    """Read the test cases of a JUnit file: file, name, outcome, properties, message."""
    cases = []
    for case in ElementTree.parse(path).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        cases.append({
            "file": case.get("classname", "").rpartition(".")[2],
            "name": case.get("name", ""),
            "outcome": "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed",
            "found": {p.get("name"): p.get("value") for p in case.iter("property")},
            "message": (bad.get("message") or "").splitlines()[0][:300] if bad is not None else "",
        })  # fmt: skip
    return cases


def page(cases: list[dict], versions: str, machine: str, date: str, seconds: float, build_seconds: float) -> str:
    """Format the page; `seconds` is wall time."""
    outcomes = collections.Counter(case["outcome"] for case in cases)
    lines = [
        HEAD.format(
            versions=versions,
            machine=machine,
            date=date,
            passed=outcomes["passed"],
            failed=outcomes["failed"],
            skipped=outcomes["skipped"],
            seconds=seconds,
            build_seconds=build_seconds,
        )
    ]
    files = collections.defaultdict(list)
    for case in cases:
        files[case["file"]].append(case)

    def cell(text):
        return text.replace("|", "\\|")

    for file, group in sorted(files.items()):  # processes end in any order
        lines += [
            f"## {file.removeprefix('test_').replace('_', ' ').capitalize()}",
            "",
            "| Test | Outcome | Found |",
            "|---|---|---|",
        ]
        for case in group:
            figures = {name: value for name, value in case["found"].items() if not name.startswith(TABLE)}
            found = case["message"] or "; ".join(f"{name} {value}" for name, value in figures.items())
            lines.append(
                f"| {cell(case['name'].removeprefix('test_').replace('_', ' '))} | {case['outcome']} | {cell(found)} |"
            )
        lines.append("")
        for case in group:
            for name, value in case["found"].items():
                if name.startswith(TABLE):
                    lines += [f"### {name.removeprefix(TABLE).strip().capitalize()}", "", value, ""]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m npu_bridge.emulator.conformance", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=PAGE,
        metavar="FILE",
        help="where the results are written (default docs/conformance.md)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(os.cpu_count() or 1, 2),
        metavar="N",
        help="processes that share the tests (default %(default)s)",
    )
    return parser


def main(arguments: list[str]) -> int:
    given, selection = _parser().parse_known_args(arguments)
    try:
        toolchain = check()
        start = time.monotonic()
        build(toolchain)
    except EmulatorError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    build_seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # xunit1, because properties of a test case do not exist in xunit2.
        form = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        shared = ["-n", str(given.processes), "--dist", "loadscope", "--no-loadscope-reorder"]
        command = [
            sys.executable,
            "-m",
            "npu_bridge.emulator",
            "--devices",
            "4",
            "--",
            "python",
            "-m",
            "pytest",
            str(TESTS),
            "--durations=10",
            *shared,
            *form,
            *selection,
        ]
        start = time.monotonic()
        # One thread for each test process and its children.
        code = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | os.environ).returncode
        seconds = time.monotonic() - start
        if not report.exists():
            return code or 1
        cases = read(report)
    versions = ", ".join(f"{name} {version}" for name, version in toolchain.versions.items())
    machine = f"Python {platform.python_version()}, {platform.machine()}, {toolchain.compiler_version}"
    if not selection:  # do not write the page from a selection of tests
        given.page.parent.mkdir(parents=True, exist_ok=True)
        given.page.write_text(page(cases, versions, machine, datetime.date.today().isoformat(), seconds, build_seconds))
        print(f"{given.page}: {len(cases)} tests")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
