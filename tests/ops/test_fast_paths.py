"""XLA CPU must run every product of bfloat16 operands as one: no operand widened to float32 on the way, no refusal at
run time.

What is read is the optimized program: a `dot` outside of the fused matrix kernels, or one with a float32 operand where
ours are bfloat16, runs three to five times slower (and with a transposed result does not run at all).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npu_bridge import ops

X = jnp.ones((2, 64, 32), jnp.bfloat16)
ONE_ROW = jnp.ones((1, 64, 32), jnp.bfloat16)
W = jnp.ones((32, 48), jnp.bfloat16)
HEADS = jnp.ones((2, 256, 4, 32), jnp.bfloat16)
IDS = jnp.ones((2, 256), jnp.int32)


def attention(**arguments):
    return lambda q: ops.attention(q, q[:, :, :2], q[:, :, :2], segment_ids_q=IDS, **arguments)


PROGRAMS = {
    "linear": (ops.linear, (X, W)),
    "linear of one row": (ops.linear, (ONE_ROW, W)),
    "linear with float32 weights": (ops.linear, (X, W.astype(jnp.float32))),
    "linear with bias": (ops.linear, (X, W, jnp.ones(48, jnp.bfloat16))),
    "linear of transposed weights": (lambda x, w: ops.linear(x, w.T), (X, W.T.astype(jnp.float32))),
    "dense attention": (attention(causal=True), (HEADS,)),
    "banded attention": (attention(causal=True, max_segment_length=32), (HEADS,)),
    "window attention": (attention(causal=False, max_segment_length=16), (HEADS,)),
    "attention in tiles": (
        lambda q: ops.attention(q, q[:, :, :2], q[:, :, :2], segment_ids_q=jnp.ones((4, 256), jnp.int32), causal=True),
        (jnp.ones((4, 256, 4, 32), jnp.bfloat16),),
    ),
    "multi-head attention": (lambda q: ops.attention(q, q, q, causal=True), (HEADS,)),
    "cross entropy": (
        lambda h, w: ops.cross_entropy(h, w, jnp.ones((2, 64), jnp.int32), jnp.ones((2, 64)), chunk=16),
        (X, W),
    ),
    "grouped matmul": (
        lambda x, w: ops.grouped_matmul(x[0], w, jnp.array([40, 24])),
        (X, jnp.ones((2, 32, 48), jnp.bfloat16)),
    ),
}


def products(function, *arrays):
    """-> the compiled program, its products, and those of them that read an operand wider than bfloat16."""
    compiled = jax.jit(function).lower(*arrays).compile()
    text = compiled.as_text()
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
    found = re.findall(r"= \w+\[[^=]* dot\((%[\w.\-]+), (%[\w.\-]+)\)", text)
    return compiled, found, [pair for pair in found if any(types.get(operand) != "bf16" for operand in pair)]


@pytest.fixture(scope="module")
def matrix_units():
    """Skip where this CPU has no bfloat16 products: XLA then widens everything, rightly."""
    if products(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32), ONE_ROW[0], W)[2]:
        pytest.skip("XLA widens even the plainest bfloat16 product here: this CPU has no bfloat16 matrix units")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_bfloat16_product_of_forward_and_backward_stays_on_the_matrix_units(name, matrix_units):
    function, arrays = PROGRAMS[name]

    def both(*arrays):
        value, pull = jax.vjp(function, *arrays)
        return value, pull(value)

    compiled, found, widened = products(both, *arrays)
    assert len(found) >= 3, f"the pattern found {len(found)} products; has the text form of XLA changed?"
    assert not widened, f"{len(widened)} of {len(found)} products read widened operands: {widened}"
    jax.block_until_ready(compiled(*arrays))


def test_the_check_above_sees_the_slow_products_that_plain_autodiff_makes(matrix_units):
    gradient = jax.grad(lambda w: jnp.dot(ONE_ROW[0], w, preferred_element_type=jnp.float32).sum())
    assert products(gradient, W)[2], "plain autodiff became fast: the explicit gradients may have become unnecessary"


def test_a_gradient_transposed_by_its_user_still_runs():
    # XLA folds a transpose into the product that feeds it, and then refuses bfloat16 operands with a float32 result.
    gradient = jax.jit(lambda x, w: jax.grad(lambda w: ops.linear(x, w).astype(jnp.float32).sum())(w).T)
    assert jnp.array_equal(gradient(X, W.astype(jnp.float32)), jnp.full((48, 32), 128.0))


# --- float32 activations, bfloat16 products --------------------------------------------------------------------------


def float32_twins(name):
    function, arrays = PROGRAMS[name]
    return function, tuple(array.astype(jnp.float32) for array in arrays)


@pytest.mark.parametrize(
    "name", ["linear", "linear of one row", "banded attention", "attention in tiles", "cross entropy", "grouped matmul"]
)
def test_under_bfloat16_precision_the_products_of_float32_arrays_stay_on_the_matrix_units_too(name, matrix_units):
    function, arrays = float32_twins(name)

    def both(*arrays):
        value, pull = jax.vjp(function, *arrays)
        return value, pull(jnp.ones_like(value))

    with jax.default_matmul_precision("bfloat16"):
        compiled, found, widened = products(both, *arrays)
    assert len(found) >= 3 and not widened, f"{len(widened)} of {len(found)} products read widened operands: {widened}"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(compiled(*arrays)))


def test_under_bfloat16_precision_a_product_rounds_its_operands_and_nothing_else():
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64, 32), (32, 48), (2, 64, 48)))
    with jax.default_matmul_precision("bfloat16"):
        y, (dx, dw) = jax.jit(lambda x, w, g: (lambda y, pull: (y, pull(g)))(*jax.vjp(ops.linear, x, w)))(x, w, g)

    def rounded(array):
        return np.asarray(jnp.asarray(array).astype(jnp.bfloat16)).astype(np.float64)

    rx, rw, rg = rounded(x), rounded(w), rounded(g)
    expected = {"y": (y, rx @ rw), "dx": (dx, rg @ rw.T), "dw": (dw, np.einsum("btd,btf->df", rx, rg))}
    for label, (got, want) in expected.items():
        # Sums of at most 128 float32 terms of size about one: 128 * 2^-24 of the largest sum of magnitudes, some 100.
        worst = np.abs(np.asarray(got, np.float64) - want).max()
        assert worst < 1e-4, f"{label}: off its formula by {worst:.1e}"
        # The rounding itself is a hundred times larger: the test would see products that are not rounded, or rounded
        # twice.
    assert np.abs(rx @ rw - x.astype(np.float64) @ w).max() > 1e-3
