"""Routed experts on several devices: numbers of one under the worst routing, no token lost, exchanges by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import npu_bridge
from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.models.layers.config import MoEConfig
from mindvl_jax.models.layers.moe import ExpertAdapter, Experts
from mindvl_jax.parallel.activations import Placement, tracing
from mindvl_jax.parallel.experts import routed
from mindvl_jax.parallel.mesh import ROW_AXES, make_mesh
from npu_bridge import ops

B, T, D, E, F, CHOSEN, REAL, RANK = 4, 16, 8, 8, 12, 3, 13, 2
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


ROUTER, WEIGHTS, INPUTS = normal(D, E), abs(normal(B, T, D)), normal(B, T, D)
KERNELS = {"gate": normal(E, D, F), "up": normal(E, D, F), "down": normal(E, F, D)}
ADAPTERS = {
    "gate_adapter": (normal(E, D, RANK), normal(E, RANK, F)),
    "down_adapter": (normal(E, F, RANK), normal(E, RANK, D)),
}
CONFIG = MoEConfig(experts=E, experts_per_token=CHOSEN, intermediate_size=F, scoring="sigmoid", renormalize=True)
NO_TOKEN_TOGETHER = np.zeros(E, np.float32)
# Every token chooses among the experts of the first devices, and the others have nothing to do.
ALL_TOGETHER = np.where(np.arange(E) < 4, 100, 0).astype(np.float32) + normal(E)
REAL_BT = np.broadcast_to(np.arange(T) < REAL, (B, T))


def program(bias):
    def route(logits, bias):
        return ops.moe_gating(
            logits, k=CHOSEN, scoring="sigmoid", bias=bias, groups=4, groups_kept=2, renormalize=True, scale=2.5
        )

    def loss(x, router, weights):
        logits = jnp.einsum("btd,de->bte", x, router)
        experts = Experts(CONFIG, D, rngs=nnx.Rngs(0), dtype=jnp.float32, layers=1, residual_scale=1.0)
        for name, value in weights.items():
            adapter = isinstance(value, tuple)
            setattr(experts, name, ExpertAdapter(*map(nnx.Param, value), 1.5) if adapter else nnx.Param(value))
        out, _, load = routed(route, experts.products, x, logits, REAL_BT, *experts.arrays(), bias)
        return jnp.sum(jnp.square(out) * WEIGHTS), load

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def mesh_of(axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.mark.parametrize(
    ("axes", "bias"),
    [({"expert": 4}, ALL_TOGETHER), ({"expert": 2, "context": 2, "tensor": 2}, NO_TOKEN_TOGETHER)],
    ids=["all on half of four devices", "with context and tensor"],
)
def test_experts_on_several_devices_give_numbers_and_counts_of_one(axes, bias):
    got = jax.jit(tracing(program(bias), Placement(mesh_of(axes))))(INPUTS, ROUTER, KERNELS | ADAPTERS)
    want = jax.jit(program(bias))(INPUTS, ROUTER, KERNELS | ADAPTERS)
    without = jax.jit(program(bias))(INPUTS, ROUTER, KERNELS)
    assert abs(without[0][0] - want[0][0]) > 0.1 * want[0][0], "the adapters do nothing"
    load = np.asarray(got[0][1])
    assert np.array_equal(load, want[0][1]) and load.sum() == CHOSEN * REAL * B, "a token was lost or counted twice"
    assert abs(got[0][0] - want[0][0]) <= 1e-6 * want[0][0]
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 1e-5 * np.linalg.norm(np.asarray(b, np.float64))


def test_the_bridge_gathers_tokens_and_scatters_sums_and_nothing_else_among_experts():
    mesh = mesh_of({"expert": 4})

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    arguments = (place(ROW_AXES), place(), dict.fromkeys(KERNELS, place("expert")))
    lowered = npu_bridge.jit(
        tracing(program(NO_TOKEN_TOGETHER), Placement(mesh, manual=False)), mesh=mesh, in_shardings=arguments,
        out_shardings=((place(), place("expert")), arguments), device="cpu",
    ).lower(INPUTS, ROUTER, KERNELS)  # fmt: skip
    found = Counter(
        (c["kind"], c["shape"]) for c in lowered.collectives() if c["dtype"] == "f32" and len(c["shape"]) == 2
    )
    tokens = B * T
    assert found == {
        ("all_gather", (tokens, D)): 2,  # tokens; the gradient of their sums
        ("all_gather", (tokens, CHOSEN)): 1,  # their weights
        ("reduce_scatter", (tokens, D)): 2,  # sums; the gradient of tokens
        ("reduce_scatter", (tokens, CHOSEN)): 1,
        ("all_reduce", (D, E)): 1,  # the gradient of the router, which every device has
    }
    products = [k for k in lowered.kernels() if k["name"] == "npu_bridge.grouped_matmul"]
    assert {k["operands"][1] for k in products} == {f"f32[{E // 4},{D},{F}]", f"f32[{E // 4},{F},{D}]"}
