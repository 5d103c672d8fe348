"""Run by torchrun, one process a rank: products joined with an exchange, against the formula in numpy float64.

Prints one line a rank.
"""

import os

import numpy as np
import torch
import torch.distributed as dist
import torch_npu

rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.npu.set_device(rank)
dist.init_process_group("hccl")
here = f"npu:{rank}"
dist.barrier()  # makes the communicator
name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
M, K, N = 2 * count, 256, 8


def made(shape, dtype, seed):
    """Of any rank: all know what the others hold."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape) / 16).to(dtype)


def same(what, got, want, parts, dtype):
    # Each rank's product is rounded once before it goes out, the sum once more; the products are below 2 here.
    step = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    got, tolerance = got.cpu().double().numpy(), 2 * step * (parts + 1)
    assert got.shape == want.shape, f"rank {rank}: {what} has shape {got.shape}, expected {want.shape}"
    error = np.abs(got - want).max()
    assert error <= tolerance, f"rank {rank}: {what} is off by {error:.2e}, allowed {tolerance:.1e}"


def refused(what, message, call):
    try:
        call()
    except RuntimeError as error:
        assert message in str(error), f"rank {rank}: {what} was refused with {error}"
    else:
        raise AssertionError(f"rank {rank}: {what} was not refused")


for dtype in (torch.bfloat16, torch.float16):
    x = [made((M, K), dtype, 10 + q) for q in range(count)]
    w = [made((K, N), dtype, 20 + q) for q in range(count)]
    b = [made((N,), dtype, 30 + q) for q in range(count)]
    x64, w64, b64 = ([t.double().numpy() for t in part] for part in (x, w, b))
    products = [x64[q] @ w64[q] for q in range(count)]
    mine, weight, bias = x[rank].to(here), w[rank].to(here), b[rank].to(here)
    turned = weight.t().contiguous().t()  # transposed in memory, the same numbers

    same("mm_all_reduce", torch_npu.npu_mm_all_reduce_base(mine, weight, name), sum(products), count, dtype)
    same(
        "mm_all_reduce of three dimensions and a bias",
        torch_npu.npu_mm_all_reduce_base(mine.view(2, -1, K), turned, name, bias=bias),
        sum(p + v for p, v in zip(products, b64)).reshape(2, -1, N),
        count,
        dtype,
    )
    x3 = [made((M, N), dtype, 40 + q) for q in range(count)]
    same("mm_all_reduce with an addition", torch_npu.npu_mm_all_reduce_base(mine, weight, name, x3=x3[rank].to(here)),
         sum(p + t.double().numpy() for p, t in zip(products, x3)), count, dtype)  # fmt: skip
    part = slice(rank * (M // count), (rank + 1) * (M // count))
    same(
        "mm_reduce_scatter",
        torch_npu.npu_mm_reduce_scatter_base(mine, turned, name, count),
        sum(products)[part],
        count,
        dtype,
    )
    out, rows = torch_npu.npu_all_gather_base_mm(mine, weight, name, count)
    same("all_gather_mm", out, np.concatenate(x64) @ w64[rank], 1, dtype)
    assert np.array_equal(rows.cpu().double().numpy(), np.concatenate(x64)), f"rank {rank}: gathered rows"
    out, rows = torch_npu.npu_all_gather_base_mm(mine, weight, name, count, gather_output=False)
    same("all_gather_mm alone", out, np.concatenate(x64) @ w64[rank], 1, dtype)
    assert rows.numel() == 0

narrow, short = (
    torch.ones(M, 128, device=here, dtype=torch.bfloat16),
    torch.ones(128, N, device=here, dtype=torch.bfloat16),
)
bad = [
    (
        "float32",
        "takes float16, bfloat16",
        lambda: torch_npu.npu_mm_all_reduce_base(mine.float(), weight.float(), name),
    ),
    (
        "a transposed left matrix",
        "must be contiguous",
        lambda: torch_npu.npu_mm_all_reduce_base(mine[:, :M].t(), weight[:M], name),
    ),
    (
        "a right matrix with gaps",
        "may be transposed and nothing else",
        lambda: torch_npu.npu_mm_all_reduce_base(mine, weight[:, ::2], name),
    ),
    (
        "a bias of another length",
        "bias is",
        lambda: torch_npu.npu_mm_all_reduce_base(mine, weight, name, bias=bias[:4]),
    ),
    (
        "a communicator that is none",
        'no communicator is named "nobody"',
        lambda: torch_npu.npu_mm_all_reduce_base(mine, weight, "nobody"),
    ),
    (
        "several turns",
        "comm_turn 2; expected 0",
        lambda: torch_npu.npu_mm_all_reduce_base(mine, weight, name, comm_turn=2),
    ),
    (
        "few elements to contract",
        "expected 256 to 65534",
        lambda: torch_npu.npu_mm_reduce_scatter_base(narrow, short, name, count),
    ),
    (
        "a bias of a scattered product",
        "the kernel takes none",
        lambda: torch_npu.npu_mm_reduce_scatter_base(mine, weight, name, count, bias=bias),
    ),
    ("another world", "its shape must be", lambda: torch_npu.npu_all_gather_base_mm(mine, weight, name, 2 * count)),
    (
        "the right matrix to gather",
        "gather_index",
        lambda: torch_npu.npu_all_gather_base_mm(mine, weight, name, count, gather_index=1),
    ),
]
for what, message, call in bad:
    refused(what, message, call)
torch.npu.synchronize()
dist.barrier()
dist.destroy_process_group()
print(f"rank {rank} of {count}: all right", flush=True)
