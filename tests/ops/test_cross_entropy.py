"""Cross entropy: what padding may hold, what a wrong target does, and a sharded vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from npu_bridge import ops

B, T, D, V = 4, 10, 16, 24


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    weights = rng.random((B, T)).astype(np.float32)
    weights[:, -3:] = 0
    return (rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32),
            rng.integers(0, V, (B, T)).astype(np.int32), weights)  # fmt: skip


def loss_and_gradients(hidden, head, targets, weights, chunk=4):
    total = lambda hidden, head, weights: ops.cross_entropy(hidden, head, targets, weights, chunk=chunk).sum()
    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(hidden, head, weights)


def test_nan_hidden_states_and_ignore_targets_at_zero_weight_change_nothing(data):
    hidden, head, targets, weights = data
    dead = weights == 0
    clean = loss_and_gradients(hidden, head, targets, weights)
    dirty = loss_and_gradients(np.where(dead[..., None], np.nan, hidden), head, np.where(dead, -100, targets), weights)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.array_equal(a, b), f"largest difference {np.abs(np.asarray(a) - np.asarray(b)).max()}"
    assert not np.asarray(clean[1][0])[dead].any()


def test_the_gradient_of_a_weight_is_the_likelihood_of_its_token(data):
    hidden, head, targets, weights = data
    logp = jax.nn.log_softmax(jnp.asarray(hidden) @ head)
    nll = -np.take_along_axis(np.asarray(logp), targets[..., None], -1)[..., 0]
    gradient = np.asarray(loss_and_gradients(hidden, head, targets, weights)[1][2])
    difference = np.abs(gradient - np.where(weights != 0, nll, 0)).max()
    assert difference < 1e-5, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("wrong", [-1, V])
def test_a_target_outside_the_vocabulary_at_a_live_place_is_nan_there_and_only_there(data, wrong):
    hidden, head, targets, weights = data
    targets = targets.copy()
    targets[1, 2] = wrong
    losses = np.asarray(ops.cross_entropy(hidden, head, targets, np.maximum(weights, 0.1), chunk=3))
    assert np.isnan(losses[1, 2]) and np.isnan(losses).sum() == 1


@pytest.mark.parametrize("spec", [P(None, "tensor"), P("fsdp", "tensor"), P("fsdp", None)], ids=str)
def test_a_sharded_head_gives_the_loss_and_gradients_of_a_whole_one(data, spec):
    hidden, head, targets, weights = data
    whole = loss_and_gradients(*data)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    with jax.set_mesh(mesh):
        rows = P("fsdp")
        sharded = loss_and_gradients(place(hidden, rows), place(head, spec), place(targets, rows), place(weights, rows))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        difference = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max()
        assert difference < 2e-6, f"largest relative difference {difference:.2e}"  # sums of shards in another order


def test_no_array_as_large_as_all_logits_exists_in_the_program():
    hidden, head = jnp.zeros((2, 64, 8), jnp.bfloat16), jnp.zeros((8, 512), jnp.bfloat16)
    total = lambda hidden, head: ops.cross_entropy(hidden, head, jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64)), chunk=8).sum()
    sizes = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.update(v.aval.size for v in eqn.outvars)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head).jaxpr)
    assert 2 * 8 * 512 in sizes, "the walk did not see the logits of a chunk"
    assert max(sizes) < 2 * 64 * 512, f"an array of {max(sizes)} elements exists; all logits are {2 * 64 * 512}"
