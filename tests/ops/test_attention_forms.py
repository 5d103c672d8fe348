"""Linear-memory forms of attention: values and gradients against the formula in float64, and the choice of form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from npu_bridge import ops
from npu_bridge.ops._blocked import Plan
from npu_bridge.ops._forms import choose_form
from npu_bridge.ops._tiled import Tiling, tiled_backward, tiled_forward, tiling_of
from tests.ops import formulas

B, T, N, K, H, J = 2, 150, 4, 2, 8, 6
NAMES = ("out", "dq", "dk", "dv")


def ids_of(longest, rows=B, places=T):
    rng, ids = np.random.default_rng(longest), np.zeros((rows, places), np.int32)
    for row in ids:
        start, number = 0, 1
        while start < places - 5:
            length = min(rng.integers(1, longest + 1), places - 5 - start)
            row[start : start + length] = number
            start, number = start + length, number + 1
    return ids


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, J), (B, T, N, J))
    ]


def formula(arrays, ids_q, ids_kv, causal, window):
    *operands, g = (torch.tensor(x, dtype=torch.float64) for x in arrays)
    operands = [x.requires_grad_() for x in operands]
    out = formulas.attention(*operands, ids_q, ids_kv, causal, window, 0.3)
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, operands, g))]


def assert_equal(wanted, found, bound):
    for name, a, b in zip(NAMES, wanted, found, strict=True):
        difference = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
        assert difference < bound, f"{name}: largest difference {difference:.1e}"


@partial(jax.jit, static_argnames=("tiling", "causal", "window"))
def tiled(q, k, v, g, *ids, tiling, causal, window=None):
    static = dict(tiling=tiling, causal=causal, window=window, scale=0.3)
    out, lse = tiled_forward(q, k, v, *ids, **static)
    return out, *tiled_backward(g, q, k, v, out, lse, *ids, **static)


# Blocks of 16 do not divide 150 positions, and groups of 3 do not divide the blocks.
TILINGS = {
    "whole rows, causal": (Tiling(16, 1, None, None), 90, True, None),
    "whole rows": (Tiling(16, 1, None, None), 90, False, None),
    "a band before": (Tiling(16, 3, 2, 0), 32, True, None),
    "a band on both sides": (Tiling(16, 3, 2, 2), 32, False, None),
    "a window on both sides": (Tiling(16, 2, 1, 1), 90, False, 12),
}


@pytest.mark.parametrize("name", TILINGS)
def test_the_blocked_form_gives_values_and_gradients_of_the_formula(arrays, name):
    tiling, longest, causal, window = TILINGS[name]
    ids = ids_of(longest)
    # Sums of at most 150 float32 products of size about one.
    assert_equal(
        formula(arrays, ids, ids, causal, window),
        tiled(*arrays, ids, ids, tiling=tiling, causal=causal, window=window),
        1e-5,
    )


@pytest.mark.parametrize("queries, keys", [(40, T), (T, 40)])
def test_the_blocked_form_takes_as_many_queries_and_keys_as_there_are(arrays, queries, keys):
    """The last query is level with the last key; queries before the first key attend nothing and yield zeros."""
    q, k, v, g = arrays
    cut = [q[:, :queries], k[:, :keys], v[:, :keys], g[:, :queries]]
    assert_equal(formula(cut, None, None, True, None), tiled(*cut, tiling=Tiling(16, 1, None, None), causal=True), 1e-5)


SPLASH = {
    "causal": dict(causal=True),
    "whole images": dict(causal=False),
    "windows": dict(causal=False, max_segment_length=20),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_kernels_give_values_and_gradients_of_the_formula(arrays, name):
    """In Pallas' interpreter.

    Rows of 150 and head dims of 8 and 6 are padded to what the kernels take; padding attends nothing.
    """
    static, ids = SPLASH[name], ids_of(20)

    @jax.jit
    def run(q, k, v, g):
        def attend(q, k, v):
            return ops.attention(q, k, v, segment_ids_q=ids, scale=0.3, implementation="splash", **static)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    assert_equal(formula(arrays, ids, ids, static["causal"], None), run(*arrays), 1e-5)


def test_the_blocked_form_in_bfloat16_differs_from_float32_by_a_few_roundings(arrays):
    ids, narrow = ids_of(90), [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    static = dict(tiling=Tiling(16, 1, None, None), causal=True)
    exact = tiled(*(x.astype(jnp.float32) for x in narrow), ids, ids, **static)
    for name, a, b in zip(NAMES, exact, tiled(*narrow, ids, ids, **static), strict=True):
        difference = float(jnp.abs(a - b.astype(jnp.float32)).max() / jnp.abs(a).max())
        assert difference < 1.6e-2, (
            f"{name}: largest difference {difference:.1e} of the largest value"
        )  # four roundings of 2^-8


def test_long_rows_on_several_devices_hold_no_scores_and_exchange_nothing():
    """8,192 positions, 4 heads: one row's scores are 1 GiB in float32."""
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def shape(*size, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (shape(2, 8192, heads, 16, spec=P("rows", None, "heads")) for heads in (4, 2))
    ids = shape(2, 8192, spec=P("rows"), dtype=jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(ops.attention(q, k, v, segment_ids_q=ids, causal=True) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(q.sharding, k.sharding, k.sharding))
    compiled = gradient.lower(q, k, k, ids).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert taken < 64 * 2**20, f"{taken / 2**20:.0f} MiB of temporaries"
    text = compiled.as_text()
    found = [
        kind
        for kind in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
        if f" {kind}(" in text
    ]
    assert not found, found


def test_a_tpu_program_calls_the_kernels_where_operands_are_whole_and_the_blocked_form_where_xla_partitions():
    q, ids = jax.ShapeDtypeStruct((2, 4096, 16, 80), jnp.bfloat16), jnp.ones((2, 4096), jnp.int32)

    def attend(q):
        return ops.attention(q, q, q, segment_ids_q=ids, causal=False, max_segment_length=64)

    gradient = jax.jit(jax.grad(lambda q: jnp.sum(attend(q).astype(jnp.float32))))
    text = gradient.trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3, "one kernel forward, two back"
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh, P("rows")))
    assert "@tpu_custom_call" not in gradient.trace(spread).lower(lowering_platforms=("tpu",)).as_text()
    local = jax.jit(
        jax.shard_map(
            jax.grad(lambda q: jnp.sum(ops.attention(q, q, q, causal=True).astype(jnp.float32))),
            mesh=mesh,
            in_specs=P("rows"),
            out_specs=P("rows"),
            check_vma=False,
        )
    )
    assert local.trace(spread).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 3


def test_auto_takes_the_form_that_fits_platform_place_and_shape():
    small = dict(plan=Plan(True, None, 0, 0, 0), rows=2, queries=100, keys=100, heads=4, ids=True)
    long = small | dict(queries=16384, keys=16384)
    across = long | dict(keys=20000)
    cases = [
        ("cpu", True, small, "reference"),
        ("cpu", True, long, "skipping"),
        ("cpu", False, long, "blocked"),
        ("cpu", True, across, "blocked"),
        ("cuda", True, long, "blocked"),
        ("cuda", True, small, "reference"),
        ("tpu", True, long, "splash"),
        ("tpu", True, small, "reference"),
        ("tpu", False, long, "blocked"),
    ]
    for platform, local, shape, wanted in cases:
        assert choose_form("auto", platform, local, **shape) == wanted, (platform, local, shape)
    with pytest.raises(ValueError, match="shorter than one block"):
        choose_form("splash", "tpu", True, **small)
    with pytest.raises(ValueError, match="shard_map"):
        choose_form("splash", "tpu", False, **long)


def test_a_bounded_reach_is_walked_in_groups_of_blocks_and_an_unbounded_one_block_by_block():
    assert tiling_of(49152, 49152, 16, left=63, right=63) == Tiling(128, 32, 1, 1)
    assert tiling_of(4096, 4096, 28, left=1024, right=0) == Tiling(512, 1, 2, 0)
    assert tiling_of(16384, 16384, 32) == Tiling(512, 1, None, None)
