"""torch's collectives, DDP and FSDP2 on the emulated HCCL, one process a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

SCRIPT = Path(__file__).with_name("collectives.py")


def torchrun(ranks, script, *options):
    command = [sys.executable, "-m", "npu_bridge.emulator", "--devices", str(ranks), *options, "--", "python", "-m", "torch.distributed.run",
               "--nproc-per-node", str(ranks), "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=580, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("ranks, transport", [(2, "shm"), (4, "shm"), (2, "tcp")])
def test_collectives_and_wrappers_of_torch_run_unchanged(ranks, transport):
    done = torchrun(ranks, SCRIPT, "--transport", transport)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all right") == ranks


def test_ranks_that_call_different_collectives_are_told_apart(tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, torch, torch_npu, torch.distributed as dist\n"
        "r = int(os.environ['RANK']); torch.npu.set_device(r); dist.init_process_group('hccl')\n"
        "x = torch.ones(4, device=f'npu:{r}')\n"
        "dist.all_reduce(x) if r else dist.all_gather_into_tensor(torch.empty(8, device=x.device), x)\n"
        "torch.npu.synchronize()\n"
    )
    done = torchrun(2, script, "--timeout", "20")
    assert done.returncode and "ranks make different calls" in done.stderr, done.stderr[-3000:]
