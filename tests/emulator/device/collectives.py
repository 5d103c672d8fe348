"""Run by torchrun, one process a rank: collectives, DDP and FSDP2 of torch on HCCL.

Prints one line a rank at the end.
"""

import copy
import os

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from torch import nn

rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.npu.set_device(rank)
dist.init_process_group("hccl")
here = f"npu:{rank}"


def same(name, got, want, tolerance=0.0):
    got, want = got.detach().cpu().float(), want.detach().cpu().float()
    difference = (got - want).abs().max().item()
    assert got.shape == want.shape and difference <= tolerance, f"rank {rank}: {name} differs by {difference}"


everyone = torch.arange(float(count))
x = torch.arange(5.0, device=here) + rank
dist.all_reduce(x)
same("all_reduce", x, torch.arange(5.0) * count + everyone.sum())
large = torch.full((700_001,), rank + 1.0, device=here, dtype=torch.bfloat16)  # several pieces, the last one odd
dist.all_reduce(large)
same("all_reduce in pieces", large, torch.full((700_001,), float(sum(range(1, count + 1)))))
m = torch.tensor([rank, -rank], device=here)
dist.all_reduce(m, op=dist.ReduceOp.MAX)
same("max of integers", m, torch.tensor([count - 1, 0]))
gathered = torch.empty(count * 3, device=here)
dist.all_gather_into_tensor(gathered, torch.full((3,), float(rank), device=here))
same("all_gather", gathered, everyone.repeat_interleave(3))
uneven = [torch.empty(i + 1, device=here) for i in range(count)]
dist.all_gather(uneven, torch.full((rank + 1,), float(rank), device=here))
same("uneven all_gather", torch.cat(uneven), torch.cat([torch.full((i + 1,), float(i)) for i in range(count)]))
scattered = torch.empty(2, device=here)
dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * count, device=here))
same("reduce_scatter", scattered, count * torch.arange(2.0 * count)[2 * rank : 2 * rank + 2])
told = torch.full((4,), float(rank), device=here)
dist.broadcast(told, count - 1)
same("broadcast", told, torch.full((4,), count - 1.0))
swapped = torch.empty(count, device=here)
dist.all_to_all_single(swapped, torch.arange(float(count), device=here) + 10 * rank)
same("all_to_all", swapped, everyone * 10 + rank)
sizes = [i + 1 for i in range(count)]
swapped = torch.empty(sum(sizes), device=here)
dist.all_to_all_single(swapped, torch.full(((rank + 1) * count,), float(rank), device=here), sizes, [rank + 1] * count)
same("all_to_all_v", swapped, torch.cat([torch.full((i + 1,), float(i)) for i in range(count)]))
after, before, received = (rank + 1) % count, (rank - 1) % count, torch.empty(3, device=here)
for work in dist.batch_isend_irecv(
    [
        dist.P2POp(dist.isend, torch.full((3,), float(rank), device=here), after),
        dist.P2POp(dist.irecv, received, before),
    ]
):
    work.wait()
same("ring of messages", received, torch.full((3,), float(before)))
pair = dist.new_group([0, 1])
if rank < 2:
    two = torch.ones(2, device=here)
    dist.all_reduce(two, group=pair)
    same("subgroup", two, torch.full((2,), 2.0))
# Two communicators, called in another order by every other rank: streams of their own keep them apart.
other = dist.new_group(list(range(count)))
one, two = torch.ones(3, device=here), torch.ones(3, device=here) * 2
groups = [(one, None), (two, other)]
works = [dist.all_reduce(t, group=g, async_op=True) for t, g in (groups if rank % 2 else reversed(groups))]
for work in works:
    work.wait()
same("communicators in any order", one + two, torch.full((3,), 3.0 * count))

torch.manual_seed(0)
whole = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
inputs = torch.randn(4 * count, 16)
whole(inputs).pow(2).mean().backward()
mine = inputs[4 * rank : 4 * rank + 4].to(here)


def replica():
    made = copy.deepcopy(whole).to(here)
    made.zero_grad(set_to_none=True)
    return made


model = nn.parallel.DistributedDataParallel(replica(), device_ids=[rank])
model(mine).pow(2).mean().backward()
for got, want in zip(model.parameters(), whole.parameters()):
    same("gradient under DDP", got.grad, want.grad, 1e-6)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

model = replica()
fully_shard(model, mesh=init_device_mesh("npu", (count,)))
model(mine).pow(2).mean().backward()
for got, want in zip(model.parameters(), whole.parameters()):
    same("gradient under FSDP2", got.grad.full_tensor(), want.grad, 1e-6)
dist.barrier()
dist.destroy_process_group()
print(f"rank {rank} of {count}: all right", flush=True)
