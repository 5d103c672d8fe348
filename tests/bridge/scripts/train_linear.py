"""A linear model on {"data": WORLD_SIZE}; argv[1] says what goes wrong: nothing, die, hang, differ, late."""

import atexit
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import npu_bridge

fault = sys.argv[1]
rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@atexit.register  # before the bridge registers its own: runs after it
def say_when():
    import torch.distributed

    print(f"rank {rank} ends at {time.time():.3f}, in the group: {torch.distributed.is_initialized()}")


r = np.random.RandomState(0)
x, y = r.randn(8, 4).astype(np.float32), r.randn(8).astype(np.float32)


def step(w, x, y, scale):
    loss, g = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2) * scale)(w)
    return w - 0.1 * g, loss


train = npu_bridge.jit(
    step,
    mesh={"data": count},
    in_shardings=(P(), P("data"), P("data")),
    out_shardings=(P(), P()),
    donate_argnums=0,
    static_argnums=3,
)
w = np.zeros(4, np.float32)
scale = 1.0 + (rank if fault == "differ" else 0)
for i in range(5):
    if i == 3 and rank == 1 and fault == "die":
        os._exit(7)
    if i == 3 and rank == 1 and fault == "hang":
        time.sleep(60)
    w, loss = train(w, x, y, scale)
if rank == 1 and fault == "late":
    time.sleep(3)
    print(f"rank 1 woke at {time.time():.3f}")
if rank == 0:
    want = np.zeros(4, np.float64)
    for _ in range(5):
        want -= 0.1 * 2 * x.T @ (x @ want - y) / 8
    gap = float(np.abs(np.asarray(w) - want).max())
    print(f"gap {gap:.3g}")
    assert gap < 1e-5
