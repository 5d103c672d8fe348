"""Operators and their gradients in float32 and bfloat16, against hand-written float64 formulas (formulas.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from npu_bridge import ops

from . import formulas

# Error relative to the largest value of the result. float32: some eighty roundings. bfloat16: its rounding is 2^-9 =
# 2e-3; the gradients of products see rounded operands (g and the probabilities), which adds up to a few of them.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2}
DTYPES = list(TOLERANCE)


def numbers(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def agree(function, formula, arrays, dtype, wide=()):
    """Values and all gradients. `wide` operands stay float32."""
    cast = [jnp.asarray(x, jnp.float32 if i in wide else dtype) for i, x in enumerate(arrays)]
    exact = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in cast]
    wanted = formula(*exact)
    g = jnp.asarray(numbers(99, wanted.shape)[0], jax.eval_shape(function, *cast).dtype)
    wanted.backward(torch.tensor(np.asarray(g, np.float64)))

    @jax.jit
    def both(arrays, g):
        value, pull = jax.vjp(function, *arrays)
        return value, *pull(g)

    results = both(cast, g)
    for number, (result, truth) in enumerate(zip(results, [wanted.detach(), *(x.grad for x in exact)], strict=True)):
        truth = truth.numpy()
        difference = np.abs(np.asarray(result, np.float64) - truth).max() / np.abs(truth).max()
        what = "value" if number == 0 else f"gradient {number - 1}"
        assert difference <= TOLERANCE[dtype], (
            f"{what}: largest relative difference {difference:.2e}, bound {TOLERANCE[dtype]:.1e}"
        )
        if number:
            assert result.dtype == cast[number - 1].dtype, f"{what} has dtype {result.dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradients_equal_the_formula(dtype):
    agree(ops.linear, formulas.linear, numbers(0, (2, 6, 16), (16, 24), (24,)), dtype)
    agree(
        ops.linear, formulas.linear, numbers(1, (1, 7, 24), (24, 16)), dtype
    )  # fewer columns behind than before: the weight gradient is turned around


def test_linear_keeps_the_weight_gradient_of_float32_weights_in_float32():
    agree(ops.linear, formulas.linear, numbers(2, (2, 6, 16), (16, 24)), "bfloat16", wide=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_their_gradients_equal_the_formula(dtype):
    agree(
        lambda x, s: ops.rms_norm(x, s, eps=1e-5),
        lambda x, s: formulas.rms_norm(x, s, 1e-5),
        numbers(3, (2, 5, 32), (32,)),
        dtype,
    )
    agree(
        lambda *a: ops.layer_norm(*a, eps=1e-5),
        lambda *a: formulas.layer_norm(*a, 1e-5),
        numbers(4, (2, 5, 32), (32,), (32,)),
        dtype,
    )


@pytest.mark.parametrize("mode", ["half", "interleaved"])
@pytest.mark.parametrize("width", [16, 10])
def test_rotary_equals_the_formula_at_full_and_partial_width_tables_included(mode, width):
    arrays = numbers(5, (2, 5, 3, 16), (2, 5, width), (2, 5, width))
    agree(lambda *a: ops.rotary(*a, mode=mode), lambda *a: formulas.rotary(*a, mode), arrays, "float32")
    agree(lambda *a: ops.rotary(*a, mode=mode), lambda *a: formulas.rotary(*a, mode), arrays, "bfloat16", wide=(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_their_gradients_equal_the_formula(dtype):
    agree(ops.swiglu, formulas.swiglu, [x * 3 for x in numbers(6, (4, 40), (4, 40))], dtype)
    for approximate in (False, True):
        agree(
            lambda x: ops.gelu(x, approximate=approximate),
            lambda x: formulas.gelu(x, approximate),
            [numbers(7, (4, 40))[0] * 3],
            dtype,
        )


IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_the_formula_for_every_head_sharing(dtype, heads, causal):
    arrays = numbers(8, (2, 9, heads[0], 16), (2, 9, heads[1], 16), (2, 9, heads[1], 16))
    agree(lambda q, k, v: ops.attention(q, k, v, segment_ids_q=jnp.asarray(IDS), causal=causal),
          lambda q, k, v: formulas.attention(q, k, v, IDS, IDS, causal, None, 0.25), arrays, dtype)  # fmt: skip


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128)], ids=str)
def test_attention_equals_the_formula_for_the_head_dims_in_use(dims):
    arrays = numbers(9, (1, 7, 2, dims[0]), (1, 7, 1, dims[0]), (1, 7, 1, dims[1]))
    agree(
        lambda q, k, v: ops.attention(q, k, v, causal=True),
        lambda q, k, v: formulas.attention(q, k, v, None, None, True, None, dims[0] ** -0.5),
        arrays,
        "bfloat16",
    )


@pytest.mark.parametrize(
    ("causal", "window", "queries", "keys"),
    [(True, 3, 9, 9), (False, 3, 9, 9), (True, None, 4, 9), (True, 3, 4, 9), (False, None, 9, 4)],
)
def test_attention_windows_and_unequal_lengths_equal_the_formula(causal, window, queries, keys):
    arrays = numbers(10, (2, queries, 2, 16), (2, keys, 2, 16), (2, keys, 2, 8))
    agree(lambda q, k, v: ops.attention(q, k, v, causal=causal, window=window, scale=0.3),
          lambda q, k, v: formulas.attention(q, k, v, None, None, causal, window, 0.3), arrays, "float32")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_cross_entropy_and_its_gradients_equal_the_formula_for_any_chunk(dtype, chunk):
    targets = np.array([[1, 2, 3, 4, -100], [0, 6, -100, 2, 1]])
    weights = np.array([[1.0, 0.5, 0, 1, 0], [1, 1, 0, 0.25, 1]])
    agree(
        lambda h, w: ops.cross_entropy(h, w, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), chunk=chunk),
        lambda h, w: formulas.cross_entropy(h, w, torch.tensor(targets), torch.tensor(weights)),
        numbers(11, (2, 5, 16), (16, 7)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_adds_the_gradients_of_repeated_ids_and_ignores_ids_outside(dtype):
    ids = np.array([[3, 3, 0, 6], [-1, 3, 7, 2]])
    agree(
        lambda t: ops.embedding(t, jnp.asarray(ids)),
        lambda t: formulas.embedding(t, torch.tensor(ids)),
        numbers(12, (7, 8)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 0, 17, 9], [0, 0, 34, 0], [1, 1, 1, 1], [0, 0, 0, 3]], ids=str)
def test_grouped_matmul_and_its_gradients_equal_the_formula(dtype, sizes):
    agree(
        lambda x, w: ops.grouped_matmul(x, w, jnp.asarray(sizes)),
        lambda x, w: formulas.grouped_matmul(x, w, sizes),
        numbers(13, (34, 16), (4, 16, 12)),
        dtype,
    )


GATES = {
    "softmax": dict(k=3, scoring="softmax", bias=None, groups=1, groups_kept=1, renormalize=True, scale=1.0),
    "plain softmax": dict(k=2, scoring="softmax", bias=None, groups=1, groups_kept=1, renormalize=False, scale=1.0),
    "grouped sigmoid with bias": dict(
        k=4, scoring="sigmoid", bias=numbers(14, (16,))[0], groups=4, groups_kept=2, renormalize=True, scale=2.5
    ),
}


@pytest.mark.parametrize("gate", GATES)
def test_gating_chooses_and_weighs_experts_as_the_formula_does(gate):
    arguments, (logits,) = GATES[gate], numbers(15, (9, 16))
    bias = arguments["bias"]
    ours = arguments | {"bias": None if bias is None else jnp.asarray(bias, jnp.float32)}
    theirs = arguments | {"bias": None if bias is None else torch.tensor(bias)}
    agree(lambda x: ops.moe_gating(x, **ours)[0], lambda x: formulas.moe_gating(x, **theirs)[0], [logits], "float32")
    experts = ops.moe_gating(jnp.asarray(logits, jnp.float32), **ours)[1]
    assert experts.tolist() == formulas.moe_gating(torch.tensor(logits), **theirs)[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_to_experts_and_back_equals_weighing_each_token_in_place(dtype):
    experts = jnp.asarray(np.random.default_rng(16).integers(0, 5, (11, 3)), jnp.int32)

    def there_and_back(tokens, weights):
        permuted, sizes, destination = ops.moe_permute(tokens, experts, num_experts=5)
        factor = jnp.repeat(jnp.arange(1, 6), sizes, total_repeat_length=33)[:, None].astype(tokens.dtype)
        return ops.moe_unpermute(permuted * factor, destination, weights)

    def in_place(tokens, weights):
        return torch.einsum("td,tk,tk->td", tokens, weights, torch.tensor(np.asarray(experts) + 1.0))

    agree(there_and_back, in_place, numbers(17, (11, 8), (11, 3)), dtype)


def test_permuted_rows_are_sorted_by_expert_and_keep_token_order():
    permuted, sizes, destination = ops.moe_permute(
        jnp.arange(4.0)[:, None], jnp.array([[2, 0], [0, 2], [1, 2], [2, 1]]), num_experts=4
    )
    assert permuted[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and sizes.tolist() == [2, 2, 4, 0]
    assert destination.tolist() == [[4, 0], [1, 5], [2, 6], [7, 3]]


def test_adamw_equals_the_published_algorithm_over_several_updates():
    rng = np.random.default_rng(18)
    p, m, v = rng.standard_normal((5, 6)), np.zeros((5, 6)), np.zeros((5, 6))
    ours, exact = [jnp.asarray(x, jnp.float32) for x in (p, m, v)], [torch.tensor(x) for x in (p, m, v)]
    settings = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        g = rng.standard_normal((5, 6))
        ours = ops.fused_adamw(
            ours[0], jnp.asarray(g, jnp.float32), *ours[1:], step=step, learning_rate=0.01 * step, **settings
        )
        exact = formulas.adamw(exact[0], torch.tensor(g), *exact[1:], step, 0.01 * step, **settings)
    difference = max(float(np.abs(np.asarray(a) - b.numpy()).max()) for a, b in zip(ours, exact))
    assert difference < 2e-6, f"largest difference {difference:.2e} after five updates"


def test_global_norm_sums_squares_of_bfloat16_leaves_in_float32():
    tree = {"a": jnp.full((1000,), 0.1, jnp.bfloat16), "b": [jnp.full((3, 4), -2.0)]}
    exact = np.sqrt(1000 * float(jnp.bfloat16(0.1)) ** 2 + 12 * 4)
    assert abs(float(ops.global_norm(tree)) / exact - 1) < 1e-6
    assert float(ops.global_norm({})) == 0.0
