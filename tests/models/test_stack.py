"""Stacked layers: the pattern of full blocks, scanning, remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.models.layers.stack import alternation, in_pieces, rematerialise, scan_alternating, scan_layers


def test_the_published_pattern_gives_two_bodies():
    assert alternation(32, (7, 15, 23, 31)) == (4, [(False, 7), (True, 1)])


@pytest.mark.parametrize(
    "depth, special",
    [(32, (7, 15, 23, 31)), (4, (1, 3)), (4, (2,)), (5, ()), (3, (0, 1, 2)), (6, (5, 0)), (1, (0,)), (7, (1, 3, 5))],
)
def test_any_list_of_special_layers_runs_in_layer_order(depth, special):
    repeats, runs = alternation(depth, special)
    flags = [flag for flag, count in runs for _ in range(count)] * repeats
    assert flags == [i in special for i in range(depth)]
    weights = jnp.arange(1.0, depth + 1)
    # Not commutative, so any layer out of its place would show.
    ordinary, extra = (lambda x, w: x * 1.5 + w), (lambda x, w: x * x / 50 - w)
    want = 0.3
    for i in range(depth):
        want = extra(want, i + 1.0) if i in special else ordinary(want, i + 1.0)
    got = jax.jit(lambda x: scan_alternating(ordinary, extra, x, weights, depth, special))(jnp.float32(0.3))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_index_outside_the_stack_is_refused():
    with pytest.raises(ValueError, match=r"\[4\] are outside a stack of 4 layers"):
        alternation(4, (1, 4))


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="expected none, full, dots or attention"):
        rematerialise(lambda x: x, "some", looped=True)


@pytest.mark.parametrize("special", [None, (1, 3)], ids=["of one kind", "of two kinds"])
def test_a_shallow_stack_keeps_its_inputs_alone_under_full_remat(special):
    """XLA on a CPU makes one of a layer and its recomputation where both stand in one sequence, whatever the barriers
    between them.
    """
    layers, rows, width = 4, 4096, 32

    def layer(x, w):
        for _ in range(4):  # each product keeps its input, so a layer keeps four arrays, and one under remat
            x = jnp.sin(x @ w)
        return x

    def gradient(remat):
        def run(x, w):
            return (
                scan_layers(layer, x, w, remat=remat)
                if special is None
                else scan_alternating(layer, layer, x, w, layers, special, remat=remat)
            )

        program = jax.jit(
            jax.grad(lambda w, x: run(x, w).sum()), compiler_options={"xla_backend_optimization_level": 0}
        )
        return program.lower(weights, x).compile()

    weights, x = jax.random.normal(jax.random.key(0), (layers, width, width)) / width**0.5, jnp.ones((rows, width))
    plain, again = gradient("none"), gradient("full")
    np.testing.assert_allclose(plain(weights, x), again(weights, x), rtol=1e-4, atol=1e-4)
    kept, least = (program.memory_analysis().temp_size_in_bytes / x.nbytes for program in (again, plain))
    # Four inputs and what the layers of one round take, one or two of them, against everything of four layers.
    assert kept < 0.75 * least and least > 4 * layers, (
        f"{kept:.1f} arrays of a layer's size with remat, {least:.1f} without"
    )


def test_pieces_of_a_row_give_what_the_row_gives():
    x, w = jax.random.normal(jax.random.key(0), (2, 48, 5)), jax.random.normal(jax.random.key(1), (5, 7))
    one, other = (
        jax.jit(jax.value_and_grad(lambda w, run=run: jnp.sum(jnp.sin(run(lambda x: x @ w, x)) * 2)))(w)
        for run in (in_pieces, lambda f, x: f(x))
    )
    for a, b in zip(one, other):
        # Sums of 96 float32 products in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert in_pieces(lambda x: x, x[:, :9]).shape == (2, 9, 5)
