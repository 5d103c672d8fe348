"""Check a short training on the device against stored losses, end to end. The caller names the command."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Sequence

from npu_bridge.doctor.findings import Finding, Group
from npu_bridge.doctor.host import Host

GROUP = Group("training")
SECONDS = 900.0


@dataclasses.dataclass(frozen=True)
class Golden:
    """A training command and its expected output.

    Attributes:
      name: for the report. command: prints a line of JSON that holds "losses" and may hold "execution".
      losses: stored, one for each step. tolerance: largest relative difference of any step. made: versions of the
        stored losses, for the report.
    """

    name: str
    command: Sequence[str]
    losses: Sequence[float]
    tolerance: float
    made: str = ""


def check(host: Host, golden: Golden, seconds: float = SECONDS) -> Finding:
    """Run the command and compare its losses."""
    by_hand = f"run it by hand: {' '.join(golden.command)}"
    try:
        done = subprocess.run(
            list(golden.command), capture_output=True, text=True, timeout=seconds, env=dict(host.environment)
        )
    except subprocess.TimeoutExpired:
        return GROUP.failed(golden.name, f"the training did not end within {seconds:.0f} s", by_hand)
    told = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"losses"')), None)
    if done.returncode or told is None:
        said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
        return GROUP.failed(golden.name, f"the training ended with {done.returncode}: {said[:300]}", by_hand)
    return compare(golden, told["losses"], told.get("execution", ""))


def compare(golden: Golden, losses: Sequence[float], execution: str = "") -> Finding:
    """Compare losses step by step, relative to the stored ones."""
    if len(losses) != len(golden.losses):
        return GROUP.failed(
            golden.name,
            f"{len(losses)} losses, {len(golden.losses)} are stored",
            "the installed package is not the one the losses were stored with: install it anew",
        )
    differences = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(losses, golden.losses)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    found = (
        f"{len(losses)} steps, largest difference {differences[worst]:.1e} at step {worst + 1}, allowed "
        f"{golden.tolerance:.0e}"
        + (f"; {execution}" if execution else "")
        + (f"; stored with {golden.made}" if golden.made else "")
    )
    if differences[worst] <= golden.tolerance:
        return GROUP.ok(golden.name, found)
    if differences[0] > golden.tolerance:
        fix = (
            "the first loss differs already: an operator of the forward pass, see the operators above; "
            "NPU_BRIDGE_EQUIVALENT=all runs plain torch instead of fused calls and tells the two apart"
        )
    else:
        fix = (
            "the first loss agrees: the backward pass or the optimizer, see the operators above; "
            "NPU_BRIDGE_EQUIVALENT=all runs plain torch instead of fused calls and tells the two apart"
        )
    return GROUP.failed(golden.name, f"{found} (loss {losses[worst]:.6f}, stored {golden.losses[worst]:.6f})", fix)
