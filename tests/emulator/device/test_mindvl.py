"""A whole MindVL run through the bridge on emulated NPUs against the same run on XLA: one device and four over HCCL,
captured.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)
import yaml

from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import loader as config_loader
from tests.training.conftest import configuration, write_data, write_tokenizer

ROOT = Path(__file__).parents[3]
STEPS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """run(name, backend, changes) -> losses and the folder."""
    folder = tmp_path_factory.mktemp("mindvl")
    write_tokenizer(folder)
    write_data(folder)
    mapping = configuration(folder, folder / "run", {"steps": STEPS, "learning_rate": 1e-3})
    return folder, mapping


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def launched(folder, mapping, name, processes, *overrides):
    own = copy.deepcopy(mapping)
    own["run"]["dir"] = str(folder / name)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    command = [
        sys.executable,
        "-m",
        "npu_bridge.emulator",
        "--devices",
        str(processes),
        "--trace",
        str(folder / f"{name}.json"),
        "--",
        "python",
        "-m",
        "npu_bridge.launch",
        "--nproc",
        str(processes),
        str(ROOT / "train.py"),
        "--config",
        str(folder / f"{name}.yaml"),
        "--set",
        *overrides,
    ]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return losses(folder / name)


@pytest.fixture(scope="module")
def on_xla(runs):
    folder, mapping = runs
    own = copy.deepcopy(mapping)
    own["run"]["dir"] = str(folder / "xla")
    train(config_loader.from_mapping(own))
    return losses(folder / "xla")


@pytest.mark.parametrize(
    "processes, mesh", [(1, ()), (4, ("mesh.fsdp=2", "mesh.tensor=2"))], ids=["1 device", "4 devices"]
)
def test_losses_of_twenty_steps_equal_xla(runs, on_xla, processes, mesh, record_property):
    folder, mapping = runs
    got = launched(folder, mapping, f"npu{processes}", processes, "backend=npu_bridge", "bridge.device=npu", *mesh)
    assert len(got) == len(on_xla) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, on_xla))
    record_property("difference", f"{worst:.1e}")
    assert worst <= 1e-5, f"losses differ by {worst:.2e}, relative"
