"""Cross entropy: what padding may hold, what a wrong target does, and a sharded vocabulary."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from npu_bridge import ops
from npu_bridge.ops._labelled import labelled_backward, labelled_forward
from npu_bridge.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward

B, T, D, V = 4, 10, 16, 24


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    weights = rng.random((B, T)).astype(np.float32)
    weights[:, -3:] = 0
    return (rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32),
            rng.integers(0, V, (B, T)).astype(np.int32), weights)  # fmt: skip


def loss_and_gradients(hidden, head, targets, weights, chunk=4):
    def total(hidden, head, weights):
        return ops.cross_entropy(hidden, head, targets, weights, chunk=chunk).sum()

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

    def place(x, s):
        return jax.device_put(x, NamedSharding(mesh, s))

    with jax.set_mesh(mesh):
        rows = P("fsdp")
        sharded = loss_and_gradients(place(hidden, rows), place(head, spec), place(targets, rows), place(weights, rows))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        difference = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max()
        assert difference < 2e-6, f"largest relative difference {difference:.2e}"  # sums of shards in another order


@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_no_array_as_large_as_all_logits_exists_in_the_program(platform):
    hidden, head = jnp.zeros((2, 64, 8), jnp.bfloat16), jnp.zeros((8, 512), jnp.bfloat16)

    def total(hidden, head):
        return ops.cross_entropy(hidden, head, jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64)), chunk=8).sum()

    text = jax.jit(jax.grad(total, (0, 1))).trace(hidden, head).lower(lowering_platforms=(platform,)).as_text()
    sizes = {math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)}
    assert 2 * 8 * 512 in sizes, "the logits of a chunk were not seen: has the text form of the program changed?"
    assert max(sizes) < 2 * 64 * 512, f"an array of {max(sizes)} elements exists; all logits are {2 * 64 * 512}"


# --- labelled places alone, in programs of one device
# ------------------------------------------------------------------


def labels(kind):
    weights = np.random.default_rng(1).random((B, 200)).astype(np.float32) + 0.1
    few = np.zeros_like(weights)
    few[1, 3], few[2, 60:80], few[3, -1] = 1, 2, 3
    return {"all": weights, "a few": few, "one": np.where(few == 3, few, 0), "none": np.zeros_like(weights)}[kind]


@pytest.mark.parametrize("kind", ["all", "a few", "one", "none"])
def test_labelled_places_alone_give_the_losses_and_gradients_of_all_places(kind):
    rng, weights = np.random.default_rng(2), labels(kind)
    hidden, g = rng.standard_normal((B, 200, D)).astype(np.float32), rng.standard_normal((B, 200)).astype(np.float32)
    head, targets = rng.standard_normal((D, V)).astype(np.float32), rng.integers(0, V, (B, 200)).astype(np.int32)
    targets[weights == 0] = -100

    def both(forward, backward):
        nll, lse = forward(hidden, head, targets, weights, chunk=70)
        return nll, *backward(g, hidden, head, targets, weights, lse, chunk=70)

    everywhere = both(
        jax.jit(cross_entropy_forward, static_argnames="chunk"),
        jax.jit(cross_entropy_backward, static_argnames="chunk"),
    )
    alone = both(
        jax.jit(labelled_forward, static_argnames="chunk"), jax.jit(labelled_backward, static_argnames="chunk")
    )
    for what, a, b in zip(("loss", "dhidden", "dhead"), everywhere, alone, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        difference = np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)
        assert difference < 2e-6, (
            f"{what}: largest difference {difference:.1e} of the largest value"
        )  # float32 sums in another order
        if kind == "none":
            assert not b.any(), f"{what} is not zero without a label"


def test_places_without_a_label_cost_no_product_with_the_output_matrix():
    hidden, head = jnp.ones((4, 512, D)), jnp.ones((D, 512))
    total = jax.jit(
        lambda weights: ops.cross_entropy(hidden, head, jnp.zeros((4, 512), jnp.int32), weights, chunk=512).sum()
    )
    text = total.lower(jnp.ones((4, 512))).compile().as_text()
    rows = {int(n) for n in re.findall(r"f32\[(\d+),512\]", text)}
    assert rows and max(rows) == 256, f"products of {sorted(rows)} rows; a piece of 2048 places has 256"
    assert "known_trip_count" not in text, "the number of pieces is fixed in the program"


def test_over_several_devices_and_on_the_npu_the_program_holds_nothing_that_depends_on_the_labels(data):
    gradient = jax.jit(jax.grad(lambda hidden, head: ops.cross_entropy(hidden, head, *data[2:], chunk=4).sum(), (0, 1)))
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    assert "stablehlo.sort" in gradient.lower(*data[:2]).as_text()
    assert "stablehlo.sort" not in gradient.lower(rows, data[1]).as_text()
    assert "stablehlo.sort" not in gradient.trace(*data[:2]).lower(lowering_platforms=("npu",)).as_text()
