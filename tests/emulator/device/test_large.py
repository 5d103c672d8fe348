"""MindVL-8B's shapes on a device that computes nothing: kernels, host time, and the real allocator's peak against the
bridge's plan.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

SCRIPT = Path(__file__).with_name("large.py")


def test_a_step_of_mindvl_8b_peaks_where_the_bridge_plans(record_property):
    # All 36 layers and 32 blocks with float32 masters and moments on one device: 141 GB that nobody writes.
    command = [
        sys.executable,
        "-m",
        "npu_bridge.emulator",
        "--no-execute",
        "--memory",
        "512GiB",
        "--",
        "python",
        str(SCRIPT),
        "36",
        "32",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=580,
        env=os.environ
        | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])

    def gib(name):
        return f"{told[name] / 2**30:.1f} GiB"

    record_property("parameters", f"{told['parameters'] / 1e9:.2f} billion")
    record_property("kernels", told["kernels"])
    record_property(
        "processor time of the host",
        f"{told['host seconds'] * 1e3:.0f} ms a step, {told['lowering seconds']:.0f} s to lower",
    )
    for name in ("planned peak", "allocator peak", "reserved"):
        record_property(name, gib(name))
    off = told["allocator peak"] / told["planned peak"] - 1
    assert abs(off) <= 0.10, (
        f"the allocator's peak is {gib('allocator peak')}, the plan says {gib('planned peak')}: {off:+.1%}"
    )
