"""torch's own operator samples: what the emulation covers is right, what it does not cover is refused by name."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

SCRIPT = Path(__file__).with_name("opinfo.py")
SECONDS = 240.0


def outcomes():
    """Outcome -> operator -> what was said.

    An operator that ends the process counts as crashed, and the next begins anew.
    """
    found, first = collections.defaultdict(dict), 0
    while True:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(SECONDS), str(first)],
            capture_output=True,
            text=True,
            timeout=580,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        begun = None
        for line in done.stdout.splitlines():
            told = json.loads(line) if line.startswith("{") else {}
            if "outcome" in told:
                found[told["outcome"]][told["operator"]] = told["said"]
                begun = None
            elif "operator" in told:
                begun = told
        if begun is None:
            return found
        found["crashed"][begun["operator"]] = (
            done.stderr.strip().splitlines()[-1][:160] if done.stderr.strip() else f"exit code {done.returncode}"
        )
        first = begun["number"] + 1


def test_operators_of_torch_are_right_or_refused_by_name(record_property):
    found = outcomes()
    covered = sum(len(found[outcome]) for outcome in ("passed", "wrong", "raised", "crashed"))
    record_property("operators with samples", covered + len(found["refused"]))
    record_property("covered", covered)
    record_property("right", f"{len(found['passed'])} ({len(found['passed']) / max(covered, 1):.1%} of the covered)")
    record_property("refused by the emulator, by name", len(found["refused"]))
    record_property("refused by torch_npu itself", len(found["refused by torch_npu"]))
    for outcome in ("raised", "crashed", "wrong"):
        if found[outcome]:
            record_property(
                outcome,
                "; ".join(f"{name} ({said})" for name, said in sorted(found[outcome].items())).replace("|", "/")[:2000],
            )
    assert len(found["passed"]) >= 250, f"only {len(found['passed'])} operators were reached in {SECONDS:.0f} s"
    bad = {name: dict(found[name]) for name in ("wrong", "crashed", "raised") if found[name]}
    assert not bad, bad
