"""Attention that leaves masked tiles out, against the formula in float64; and where it is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from npu_bridge import ops
from npu_bridge.ops._skipping import Tiles, skipping_backward, skipping_forward, tiles_of
from tests.ops import formulas

B, T, N, K, H, J = 2, 70, 4, 2, 8, 6
TILES = Tiles(queries=8, keys=16, piece=3)  # T is no multiple, neither are the blocks of the pieces


def ids_of(kind):
    rng, ids = np.random.default_rng(3), np.zeros((B, T), np.int32)
    if kind == "samples of many lengths, padding behind":
        for row, lengths in zip(ids, ([1, 30, 7, 20], [44, 3])):
            row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    elif kind == "one sample a row":
        ids[:] = 1
    elif kind == "ids in no order, padding between":
        ids[:] = rng.integers(0, 4, (B, T))
    elif kind == "a row of padding alone":
        ids[1] = np.repeat([1, 2], 35)
    return ids


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, J), (B, T, N, J))
    ]


@partial(jax.jit, static_argnames=("causal", "window", "tiles"))
def compute(q, k, v, g, ids_q, ids_kv, causal, window, tiles=TILES):
    static = dict(tiles=tiles, causal=causal, window=window, scale=0.3)
    out, lse = skipping_forward(q, k, v, ids_q, ids_kv, **static)
    return out, *skipping_backward(g, q, k, v, out, lse, ids_q, ids_kv, **static)


@pytest.mark.parametrize("causal", [True, False])
def test_steps_as_short_as_blocks_change_nothing(arrays, causal):
    ids = ids_of("samples of many lengths, padding behind")
    short, long = (compute(*arrays, ids, ids, causal, None, tiles=tiles) for tiles in (Tiles(8, 8, 3), TILES))
    for name, a, b in zip(("out", "dq", "dk", "dv"), short, long, strict=True):
        # The same sums of at most 70 float32 products, cut at other places.
        difference = np.abs(np.asarray(a) - np.asarray(b)).max()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


def values_and_gradients(*arguments):
    return [np.asarray(x, np.float32) for x in compute(*arguments)]


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (False, 9)])
@pytest.mark.parametrize(
    "kind",
    [
        "samples of many lengths, padding behind",
        "one sample a row",
        "ids in no order, padding between",
        "a row of padding alone",
    ],
)
def test_values_and_gradients_are_those_of_the_formula(arrays, kind, causal, window):
    ids = ids_of(kind)
    *operands, g = (torch.tensor(x, dtype=torch.float64) for x in arrays)
    operands = [x.requires_grad_() for x in operands]
    out = formulas.attention(*operands, ids, ids, causal, window, 0.3)
    wanted = [out, *torch.autograd.grad(out, operands, g)]
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), wanted, values_and_gradients(*arrays, ids, ids, causal, window), strict=True
    ):
        difference = np.abs(a.detach().numpy() - b).max()
        # Sums of at most 70 float32 products of size about one.
        assert difference < 1e-5, f"{name}: off its formula by {difference:.1e}"


def test_queries_and_keys_may_have_ids_of_their_own(arrays):
    ids_q, ids_kv = ids_of("samples of many lengths, padding behind"), ids_of("ids in no order, padding between")
    *operands, _g = (torch.tensor(x, dtype=torch.float64) for x in arrays)
    wanted = formulas.attention(*operands, ids_q, ids_kv, False, None, 0.3).numpy()
    difference = np.abs(wanted - values_and_gradients(*arrays, ids_q, ids_kv, False, None)[0]).max()
    assert difference < 1e-5, f"off its formula by {difference:.1e}"


def test_tiles_of_other_samples_are_never_read(arrays):
    ids = np.repeat([[1, 2, 0]], [16, 32, 22], 1).repeat(B, 0)
    clean = values_and_gradients(*arrays, ids, ids, True, None)
    other = (ids != 1)[..., None, None]
    # A product of a weight of zero and a NaN is NaN: only what is not computed stays clean.
    dirty = values_and_gradients(*(np.where(other, np.nan, x) for x in arrays), ids, ids, True, None)
    for name, a, b in zip(("out", "dq"), clean[:2], dirty[:2], strict=True):
        a, b = a[:, :16], b[:, :16]
        assert np.array_equal(a, b), f"{name}: {np.isnan(b).sum()} NaN came from another sample"


def test_bfloat16_differs_from_float32_by_a_few_roundings(arrays):
    ids = ids_of("samples of many lengths, padding behind")
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    exact = values_and_gradients(*(np.asarray(x, np.float32) for x in narrow), ids, ids, True, None)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), exact, values_and_gradients(*narrow, ids, ids, True, None), strict=True
    ):
        difference = np.abs(a - b).max() / np.abs(a).max()
        assert difference < 1.6e-2, (
            f"{name}: largest difference {difference:.1e} of the largest value"
        )  # four roundings of 2^-8


def test_one_cpu_skips_tiles_and_neither_several_nor_the_npu_do():
    q = jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)
    attend = jax.jit(lambda q: ops.attention(q, q, q, segment_ids_q=jnp.ones(q.shape[:2], jnp.int32), causal=True))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh, P("data")))
    assert "stablehlo.while" in attend.lower(q).as_text()
    assert "stablehlo.while" not in attend.lower(rows).as_text()
    assert "stablehlo.while" not in attend.trace(q).lower(lowering_platforms=("npu",)).as_text()
    assert "stablehlo.while" not in attend.trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert tiles_of(2, 64, 4) is None, "rows of 64 places are one tile or two"


def test_a_narrow_band_is_taken_in_tiles_from_a_million_logits_on():
    windows = jax.jit(
        lambda q: ops.attention(
            q, q, q, segment_ids_q=jnp.ones(q.shape[:2], jnp.int32), causal=False, max_segment_length=64
        )
    )

    def logits(places):
        return 2 * places * 192 * 4  # heads, places, and the keys that a block of 64 reaches, in float32

    for places, in_tiles in ((2048, False), (4096, True)):
        lowered = windows.lower(jax.ShapeDtypeStruct((1, places, 2, 8), jnp.float32))
        assert ("stablehlo.while" in lowered.as_text()) == in_tiles
        taken = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes
        assert (taken < logits(places)) == in_tiles, (
            f"{places} places: {taken} bytes, one array of logits has {logits(places)}"
        )
