"""Stacked layers: the pattern of full blocks, scanning, remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.models.stack import alternation, rematerialise, scan_alternating


def test_the_published_pattern_gives_two_bodies():
    assert alternation(32, (7, 15, 23, 31)) == (4, [(False, 7), (True, 1)])


@pytest.mark.parametrize("depth, special", [(32, (7, 15, 23, 31)), (4, (1, 3)), (4, (2,)), (5, ()), (3, (0, 1, 2)), (6, (5, 0)), (1, (0,)), (7, (1, 3, 5))])
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
        rematerialise(lambda x: x, "some")
