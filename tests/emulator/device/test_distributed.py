"""torch's collectives, DDP and FSDP2 on the emulated HCCL, one process a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

SCRIPT = Path(__file__).with_name("collectives.py")


def torchrun(ranks, script, *options):
    command = [
        sys.executable,
        "-m",
        "npu_bridge.emulator",
        "--devices",
        str(ranks),
        *options,
        "--",
        "python",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(script),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=580, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("ranks, transport", [(2, "shm"), (4, "shm"), (2, "tcp")])
def test_collectives_and_wrappers_of_torch_run_unchanged(ranks, transport):
    done = torchrun(ranks, SCRIPT, "--transport", transport)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all right") == ranks


def test_products_joined_with_an_exchange_follow_the_formula():
    done = torchrun(4, SCRIPT.with_name("products.py"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all right") == 4


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


REDUCE = (
    "import os, torch, torch_npu, torch.distributed as dist\n"
    "r = int(os.environ['RANK']); torch.npu.set_device({device}); dist.init_process_group('hccl')\n"
    "x = torch.ones(4, device='npu') * (r + 1)\n"
    "dist.all_reduce(x)\n"
    "assert x.tolist() == [3.0] * 4 and torch.npu.device_count() == {count}\n"
    "print('all right', flush=True)\n"
    "dist.destroy_process_group()\n"
)


@pytest.mark.parametrize(
    "device, count, message",
    [
        pytest.param("3 - 2 * r", 4, None, id="more devices than ranks"),
        pytest.param(
            "0",
            2,
            "ranks 0 and 1 both use device 0; each rank calls torch.npu.set_device",
            id="two ranks on one device",
        ),
        pytest.param("r", 1, "device 1 asked for, this process has 1 ", id="more ranks than devices"),
    ],
)
def test_a_rank_has_a_device_of_its_own(tmp_path, device, count, message):
    script = tmp_path / "reduce.py"
    script.write_text(REDUCE.format(device=device, count=count))
    done = torchrun(2, script, "--devices", str(count), "--timeout", "30")
    if message is None:
        assert done.returncode == 0 and done.stdout.count("all right") == 2, done.stderr[-3000:]
    else:
        assert done.returncode and message in done.stderr and "all right" not in done.stdout, done.stderr[-3000:]
