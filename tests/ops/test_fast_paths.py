"""XLA CPU must run every product of bfloat16 operands as one: no operand widened to float32 on the way, no refusal at run time.

What is read is the optimized program: a `dot` outside of the fused matrix kernels, or one with a float32 operand where ours are
bfloat16, runs three to five times slower (and with a transposed result does not run at all).
"""

import re

import jax
import jax.numpy as jnp
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
    "multi-head attention": (lambda q: ops.attention(q, q, q, causal=True), (HEADS,)),
    "cross entropy": (lambda h, w: ops.cross_entropy(h, w, jnp.ones((2, 64), jnp.int32), jnp.ones((2, 64)), chunk=16), (X, W)),
    "grouped matmul": (lambda x, w: ops.grouped_matmul(x[0], w, jnp.array([40, 24])), (X, jnp.ones((2, 32, 48), jnp.bfloat16))),
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
    """Skips where this CPU has no bfloat16 products: XLA then widens everything, rightly."""
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
