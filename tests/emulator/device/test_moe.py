"""A mixture-of-experts layer trained on the emulated NPU: by torch_npu's routing and grouped products, and in JAX
through the bridge.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import torch_npu

import npu_bridge
import npu_bridge.emulator as emulator
from npu_bridge import ops

TOKENS, WIDTH, INNER, EXPERTS, CHOSEN, RATE = 24, 16, 32, 4, 2, 0.1


class Grouped(torch.autograd.Function):
    """Rows sorted by expert times their expert's matrix; torch_npu has no gradient of its own for it."""

    @staticmethod
    def forward(x, w, counts):
        return torch_npu.npu_grouped_matmul([x], [w], group_list=counts, split_item=2, group_type=0, group_list_type=1)[
            0
        ]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w, counts = ctx.saved_tensors
        dx = torch_npu.npu_grouped_matmul(
            [g], [w.transpose(1, 2)], group_list=counts, split_item=2, group_type=0, group_list_type=1
        )[0]
        dw = torch_npu.npu_grouped_matmul(
            [x.t()], [g], group_list=counts, split_item=3, group_type=2, group_list_type=1
        )[0]
        return dx, dw, None


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "gate": (EXPERTS, WIDTH, INNER),
        "up": (EXPERTS, WIDTH, INNER),
        "down": (EXPERTS, INNER, WIDTH),
    }
    made = {name: (rng.standard_normal(shape) / shape[-2] ** 0.5).astype(np.float32) for name, shape in shapes.items()}
    return (
        made,
        rng.standard_normal((TOKENS, WIDTH)).astype(np.float32),
        rng.standard_normal((TOKENS, WIDTH)).astype(np.float32),
    )


def routed(w, x):
    """Scores of the chosen experts, renormalised, and their numbers."""
    scores, experts = (x @ w["router"]).softmax(-1).topk(CHOSEN, dim=-1)
    return scores / scores.sum(-1, keepdim=True), experts


def fused(w, x):
    scores, experts = routed(w, x)
    rows, order = torch_npu.npu_moe_token_permute(x, experts.int())
    counts = F.one_hot(experts.flatten(), EXPERTS).sum(0)
    h = torch_npu.npu_swiglu(
        torch.cat((Grouped.apply(rows, w["gate"], counts), Grouped.apply(rows, w["up"], counts)), -1)
    )
    return torch_npu.npu_moe_token_unpermute(Grouped.apply(h, w["down"], counts), order, probs=scores)


def plain(w, x):
    """Every expert on every token, weighted; no sorting anywhere."""
    scores, experts = routed(w, x)
    weight = torch.zeros(TOKENS, EXPERTS, device=x.device).scatter(1, experts, scores)
    h = F.silu(torch.einsum("td,edf->tef", x, w["gate"])) * torch.einsum("td,edf->tef", x, w["up"])
    return torch.einsum("tef,efd,te->td", h, w["down"], weight)


def train(layer, device, steps=3):
    made, x, y = weights()
    w = {name: torch.tensor(value).to(device).requires_grad_() for name, value in made.items()}
    x, y = torch.tensor(x).to(device), torch.tensor(y).to(device)
    adam = torch.optim.AdamW(w.values(), lr=1e-2, fused=device == "npu")
    found = []
    for _ in range(steps):
        loss = F.mse_loss(layer(w, x), y)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        found.append(loss.item())
    return found


def test_three_steps_by_torch_npus_routing_equal_plain_torch(record_property):
    with emulator.count() as counts:
        got = train(fused, "npu")
    wanted = train(plain, "cpu")
    worst = max(abs(a - b) / b for a, b in zip(got, wanted))
    record_property("difference", f"{worst:.1e}")
    record_property(
        "kernels",
        ", ".join(
            f"{name.removeprefix('aclnn')} {n}"
            for name, n in counts.kernels.items()
            if "Moe" in name or "Grouped" in name
        ),
    )
    assert worst <= 1e-5, f"losses differ by {worst:.2e}: {got} and {wanted}"
    assert counts.kernels["aclnnGroupedMatmulV5"] == 3 * 3 * 3  # three products a step, each with two gradients


def jax_loss(w, x, y):
    """The same layer by npu_bridge.ops."""
    scores, experts = ops.moe_gating(x @ w["router"], k=CHOSEN, renormalize=True)
    rows, sizes, destination = ops.moe_permute(x, experts, num_experts=EXPERTS)
    h = ops.swiglu(ops.grouped_matmul(rows, w["gate"], sizes), ops.grouped_matmul(rows, w["up"], sizes))
    out = ops.moe_unpermute(ops.grouped_matmul(h, w["down"], sizes), destination, scores)
    return jnp.mean((out - y) ** 2)


def jax_step(w, x, y):
    loss, gradients = jax.value_and_grad(jax_loss)(w, x, y)
    return jax.tree.map(lambda a, g: a - RATE * g, w, gradients), loss


def test_ten_steps_through_the_bridge_equal_xla_and_are_captured(record_property):
    made, x, y = weights()
    on_npu = npu_bridge.jit(jax_step, donate_argnums=0, device="npu")
    x_npu, y_npu = npu_bridge.jit(lambda *z: jax.tree.map(jnp.copy, z), device="npu")(x, y)  # they stay on the device
    on_xla, a, b, worst = jax.jit(jax_step), made, made, 0.0
    for _ in range(10):
        with emulator.count() as counts:
            a, loss = on_npu(a, x_npu, y_npu)
        b, wanted = on_xla(b, x, y)
        worst = max(worst, abs(float(np.asarray(loss)) / float(wanted) - 1))
    record_property("difference", f"{worst:.1e}")
    record_property("kernels of a step", sum(counts.kernels.values()))
    record_property("replays", counts.replays)
    assert worst <= 1e-5, f"losses differ by {worst:.2e}, relative"
    assert counts.replays == 1 and not counts.synchronisations
    # The formula of the layer itself has plain torch as its witness.
    by_torch = F.mse_loss(
        plain({name: torch.tensor(value) for name, value in made.items()}, torch.tensor(x)), torch.tensor(y)
    ).item()
    assert abs(float(jax_loss(made, x, y)) - by_torch) < 1e-5 * by_torch
