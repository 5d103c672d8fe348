"""Blocked attention against the dense path: a promise may save work, never change a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npu_bridge import ops
from npu_bridge.ops._blocked import plan_blocks, reached_blocks, sum_reached_blocks


def segments(rng, rows, places, longest, padding=5):
    ids = np.zeros((rows, places), np.int32)
    for row in ids:
        place, number = 0, 1
        while place < places - padding:
            length = min(rng.integers(1, longest + 1), places - padding - place)
            row[place : place + length] = number
            place, number = place + length, number + 1
    return jnp.asarray(ids)


def values_and_gradients(arrays, g, **arguments):
    @jax.jit
    def run(arrays, g):
        out, pull = jax.vjp(lambda *a: ops.attention(*a, **arguments), *arrays)
        return out, *pull(g)

    return run(arrays, g)


CASES = [
    # places, heads, key heads, head dims, longest segment, causal, window
    (300, 4, 2, (16, 16), 40, True, None),
    (300, 4, 4, (16, 8), 40, False, None),
    (201, 3, 1, (8, 8), 7, False, None),
    (300, 2, 2, (16, 16), None, True, 30),
    (300, 2, 2, (16, 16), None, False, 30),
    (260, 2, 1, (16, 16), 100, True, 30),
    (130, 2, 2, (8, 8), 129, False, None),
    (70, 2, 2, (8, 8), 1, True, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_give_the_values_and_gradients_of_dense_attention_on_random_segments(case):
    places, heads, key_heads, (dim, value_dim), longest, causal, window = case
    rng = np.random.default_rng(places)
    shapes = (
        (2, places, heads, dim),
        (2, places, key_heads, dim),
        (2, places, key_heads, value_dim),
        (2, places, heads, value_dim),
    )
    *arrays, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    arguments = dict(
        segment_ids_q=segments(rng, 2, places, longest) if longest else None,
        causal=causal,
        window=window,
        max_segment_length=longest,
    )
    dense = values_and_gradients(arrays, g, implementation="dense", **arguments)
    banded = values_and_gradients(arrays, g, implementation="banded", **arguments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), dense, banded):
        difference = float(jnp.abs(a - b).max())
        # The same numbers summed in another order: a few float32 roundings of values up to 4.
        assert difference < 5e-6, f"{name}: largest difference {difference:.2e}"


def test_bfloat16_blocks_differ_from_dense_by_no_more_than_one_rounding():
    rng = np.random.default_rng(1)
    *arrays, g = (jnp.asarray(rng.standard_normal((1, 300, 2, 16)), jnp.bfloat16) for _ in range(4))
    arguments = dict(segment_ids_q=segments(rng, 1, 300, 50), causal=True, max_segment_length=50)
    dense = values_and_gradients(arrays, g, implementation="dense", **arguments)
    banded = values_and_gradients(arrays, g, implementation="banded", **arguments)
    for name, a, b in zip(("out", "dq", "dk", "dv"), dense, banded):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        difference = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        assert difference < 8e-3, (
            f"{name}: largest relative difference {difference:.2e}"
        )  # two roundings of 2^-9 each way


def test_padding_yields_zeros_and_passes_no_gradient_whatever_finite_numbers_it_holds():
    rng = np.random.default_rng(2)
    q, k, v, g = (rng.standard_normal((1, 80, 2, 8)).astype(np.float32) for _ in range(4))
    ids = np.ones((1, 80), np.int32)
    ids[:, 60:] = 0
    clean = values_and_gradients([q, k, v], g, segment_ids_q=jnp.asarray(ids), causal=True)
    for x in clean:
        assert not np.asarray(x)[:, 60:].any(), "padding got a value or a gradient"
    garbage = [np.where((ids == 0)[..., None, None], 1e4, x).astype(np.float32) for x in (q, k, v, g)]
    dirty = values_and_gradients(garbage[:3], garbage[3], segment_ids_q=jnp.asarray(ids), causal=True)
    for name, a, b in zip(("out", "dq", "dk", "dv"), clean, dirty):
        difference = float(np.abs(np.asarray(a) - np.asarray(b))[:, :60].max())
        assert difference == 0, f"{name} of the samples depends on the padding by {difference:.2e}"


def test_reached_keys_are_the_neighbours_of_each_block_and_sum_back_as_the_transpose():
    plan = plan_blocks(10, 10, causal=False, window=None, max_segment_length=3, implementation="banded")._replace(
        size=4, left=2, right=2
    )
    places = jnp.arange(1.0, 11)[None]
    assert reached_blocks(plan, places)[0].tolist() == [
        [0, 0, 1, 2, 3, 4, 5, 6],
        [3, 4, 5, 6, 7, 8, 9, 10],
        [7, 8, 9, 10, 0, 0, 0, 0],
    ]
    transpose = jax.linear_transpose(lambda x: reached_blocks(plan, x), places)
    blocks = jnp.asarray(np.random.default_rng(3).standard_normal((1, 3, 8)), jnp.float32)
    assert jnp.allclose(sum_reached_blocks(plan, blocks, 10), transpose(blocks)[0], atol=1e-6)


def test_the_plan_takes_blocks_only_where_they_save_work():
    def plan(T, S, **k):
        return plan_blocks(T, S, **(dict(causal=True, window=None, max_segment_length=None) | k))

    assert plan(4096, 4096).size == 0, "no promise, no band"
    assert plan(4096, 4096, max_segment_length=4096).size == 0, "a promise as long as the row saves nothing"
    assert plan(1, 4096, max_segment_length=64).size == 0, "decoding has one query"
    windows = plan(4096, 4096, causal=False, max_segment_length=64)
    assert windows.size and windows.size + windows.left + windows.right <= 256, f"64-patch windows reach {windows}"
    assert plan(4096, 4096, max_segment_length=512, window=100).left == 112, "the tighter promise counts"


REFUSALS = {
    "key heads that do not divide": dict(k=(1, 8, 3, 4), v=(1, 8, 3, 4), match="do not divide"),
    "head dims apart": dict(k=(1, 8, 2, 6), match="one head dim"),
    "rows apart": dict(v=(2, 8, 2, 4), match="B, S or K differ"),
    "band without a promise": dict(implementation="banded", match="max_segment_length or window"),
    "unknown implementation": dict(implementation="flash", match="expected None, 'dense', 'banded' or one of 'auto'"),
    "window of nothing": dict(window=0, match="at least 1"),
    "ids of another shape": dict(segment_ids_q=(1, 7), match="segment_ids_q"),
    "lengths without ids": dict(lengths=(1, 3), match="segment_ids_q as well"),
    "queries alone named where keys differ": dict(
        k=(1, 9, 2, 4), v=(1, 9, 2, 4), segment_ids_q=(1, 8), match="pass segment_ids_kv"
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_are_refused_with_what_was_found_and_expected(name):
    case = dict(REFUSALS[name])
    match, shapes = case.pop("match"), [case.pop(x, (1, 8, 4, 4) if x == "q" else (1, 8, 2, 4)) for x in "qkv"]
    case = {key: jnp.ones(value, jnp.int32) if isinstance(value, tuple) else value for key, value in case.items()}
    with pytest.raises(ValueError, match=match):
        ops.attention(*(jnp.zeros(s) for s in shapes), causal=True, **case)


def test_integers_are_refused_as_a_type_error():
    with pytest.raises(TypeError, match="q has dtype int32"):
        ops.attention(*(jnp.zeros((1, 4, 2, 4), jnp.int32) for _ in range(3)), causal=True)
