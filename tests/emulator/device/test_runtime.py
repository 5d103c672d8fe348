"""The runtime as torch_npu sees it: memory, streams, errors by name, counters, capture."""

import os
import subprocess
import sys

import pytest
import torch
import torch_npu

import npu_bridge.emulator as emulator


def on_npu(x):
    return x.to("npu")


def fresh(script, *options, **environment):
    """Run a script in an emulator of its own."""
    command = [sys.executable, "-m", "npu_bridge.emulator", *options, "--", "python", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)


def test_arithmetic_and_copies_agree_with_the_cpu():
    a = torch.randn(3, 5)
    assert torch.equal((on_npu(a) * 2 + 1).cpu(), a * 2 + 1)
    assert torch.equal(on_npu(a).t().contiguous().cpu(), a.t())


def test_chunks_of_uneven_tensors_are_laid_side_by_side_and_filled_with_zeros():
    x, y = on_npu(torch.arange(10.0).view(5, 2)), on_npu(torch.arange(10.0, 14.0))
    with emulator.count() as counts:
        packed = torch._chunk_cat([x, y], 0, 2)
    assert packed.cpu().tolist() == [[0, 1, 2, 3, 4, 5, 10, 11], [6, 7, 8, 9, 0, 0, 12, 13]]
    assert counts.kernels == {"aclnnChunkCat": 1}


def test_an_operator_nobody_wrote_is_named_with_shapes_and_python_line():
    x = on_npu(torch.randn(3, 4))
    with pytest.raises(
        RuntimeError, match=r"aclnnLinalgCross.*float32\[3, 3\].* has no emulation, at .*test_runtime.py:\d+ in "
    ):
        torch.linalg.cross(
            x[:, :3], x[:, :3]
        )  # linalg.inv and its like never reach CANN: torch_npu computes them on the CPU


def test_a_legacy_operator_is_refused_by_name():
    with pytest.raises(RuntimeError, match="legacy graph-engine operator Swish"):
        torch_npu.npu_silu(on_npu(torch.randn(3, 4))).cpu()


REFUSED = {
    "mode 2 without a mask": (dict(sparse_mode=2), "sparse_mode 2 without atten_mask"),
    "a small mask in mode 2": (dict(sparse_mode=2, mask=(16, 16)), r"expected the compressed triangle \[2048, 2048\]"),
    "a float mask": (dict(mask=(8, 8), mask_dtype=torch.float32), "atten_mask is float32"),
    "a wrong number of heads": (dict(heads=3), "head_num 3, but query has 4 heads"),
    "integers": (dict(dtype=torch.int32), "query is int32"),
    "another head size of the key": (dict(key_dim=8), "head dims"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_refuses_what_the_device_would_compute_wrongly(case):
    given, message = REFUSED[case]
    dtype = given.get("dtype", torch.float32)
    q = on_npu(torch.ones(1, 8, 4, 16).to(dtype))
    k = on_npu(torch.ones(1, 8, 2, given.get("key_dim", 16)).to(dtype))
    mask = on_npu(torch.zeros(given["mask"]).to(given.get("mask_dtype", torch.bool))) if "mask" in given else None
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(
            q, k, k, given.get("heads", 4), "BSND", atten_mask=mask, sparse_mode=given.get("sparse_mode", 0)
        )


def test_swiglu_and_rotary_refuse_shapes_that_meta_lets_through():
    with pytest.raises(RuntimeError, match="must be even"):
        torch_npu.npu_swiglu(on_npu(torch.ones(2, 7)))
    with pytest.raises(RuntimeError, match="is neither 1 nor that of x"):
        torch_npu.npu_rotary_mul(
            on_npu(torch.ones(2, 8, 4, 16)), on_npu(torch.ones(1, 3, 1, 16)), on_npu(torch.ones(1, 3, 1, 16))
        )


def test_counters_name_kernels_copies_and_synchronisations():
    x = on_npu(torch.ones(4))
    with emulator.count() as counts:
        y = x + x
        y = y * 3
        y.sum().item()
    assert counts.kernels == {"aclnnAdd": 1, "aclnnMuls": 1, "aclnnReduceSum": 1}
    assert counts.copies == {"device to host": 1} and sum(counts.synchronisations.values()) >= 1
    assert "aclnnMuls" in counts.table()


def test_a_graph_replays_on_the_same_addresses_and_counts_as_one_launch():
    x = on_npu(torch.ones(4))
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y = x * 3
        z = y + x
    x.fill_(2.0)
    with emulator.count() as counts:
        graph.replay()
        torch.npu.synchronize()
    assert z.cpu().tolist() == [8.0] * 4
    assert counts.replays == 1 and counts.kernels == {"aclnnMuls": 1, "aclnnAdd": 1}


def test_reading_the_device_inside_a_capture_is_refused():
    x = on_npu(torch.ones(4))
    with pytest.raises(RuntimeError, match="captur"), torch.npu.graph(torch.npu.NPUGraph()):
        (x * 3).sum().item()


def test_events_order_streams():
    side, event = torch.npu.Stream(), torch.npu.Event()
    with torch.npu.stream(side):
        x = on_npu(torch.ones(1000)) * 2
        event.record()
    event.wait()
    assert (x + 1).cpu().sum() == 3000


def test_past_the_memory_limit_comes_torch_npus_own_error():
    script = (
        "import torch, torch_npu\nx = []\nwhile True: x.append(torch.empty(32 << 20, dtype=torch.uint8, device='npu'))"
    )
    done = fresh(script, "--memory", "128MiB")
    assert "NPU out of memory" in done.stderr and "128" in done.stderr, done.stderr[-1500:]


def test_without_execution_a_model_larger_than_the_machine_is_planned_by_the_real_allocator():
    script = (
        "import torch, torch_npu\nw = torch.empty(20 << 30, dtype=torch.uint8, "
        "device='npu').view(torch.bfloat16).view(-1, 4096)\n"
        "y = torch.empty(4096, 4096, dtype=torch.bfloat16, device='npu') @ "
        "w[:4096]\nprint(torch.npu.max_memory_allocated() >> 30)"
    )
    done = fresh(script, "--no-execute", "--memory", "64GiB")
    assert done.stdout.strip().endswith("20"), done.stdout + done.stderr[-1500:]


def test_a_missing_event_is_a_wrong_result_when_streams_are_late():
    script = """
import torch, torch_npu
side = torch.npu.Stream()
x = torch.zeros(8, device='npu')
big = torch.ones(2048, 2048, device='npu'); torch.npu.synchronize()
def run(wait):
    x.zero_(); torch.npu.synchronize()
    for _ in range(4): big @ big  # long work in this stream's queue: the other stream reads x before it is filled
    x.fill_(1.0)
    if wait: side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side): y = x * 2
    side.synchronize(); torch.npu.synchronize()
    return y.sum().item()
print(run(True), run(False))
"""
    done = fresh(script, "--asynchronous", "--delay", "0.05")
    right, wrong = map(float, done.stdout.split()[-2:])
    assert right == 16.0, done.stdout
    assert wrong == 0.0, done.stdout


def test_a_child_without_the_environment_says_what_is_missing():
    command = [sys.executable, "-c", "import torch, torch_npu; print(torch.empty(1, device='npu'))"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NPU_EMULATOR_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode and "python -m npu_bridge.emulator" in done.stderr, done.stderr[-1500:]
