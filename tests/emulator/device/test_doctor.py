"""`mindvl doctor` where the device is emulated: everything it does on a host with NPUs, but driver and CANN."""

import json
import os
import subprocess
import sys

import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)


def test_the_doctor_finds_nothing_to_mend_in_the_emulation(record_property):
    command = [
        sys.executable,
        "-m",
        "npu_bridge.emulator",
        "--devices",
        "2",
        "--",
        "python",
        "-m",
        "mindvl_jax.cli.main",
        "doctor",
        "--json",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=580,
        env=os.environ
        | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(done.stdout)
    bad = [finding for finding in told["findings"] if finding["outcome"] not in ("ok", "left out")]
    groups = {
        name: sum(finding["group"] == name and finding["outcome"] == "ok" for finding in told["findings"])
        for name in ("host", "network", "operators", "collectives", "training")
    }
    for name, count in groups.items():
        record_property(name, f"{count} ok")
    assert done.returncode == 0 and not bad, bad
    assert groups["operators"] >= 28 and groups["collectives"] == 8 and groups["training"] == 3, groups
