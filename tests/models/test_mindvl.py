"""The assembled model: isolation, masks, dtypes, remat, cache, placement on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.models.layers.cache import KVCache
from mindvl_jax.models.layers.decoder import Decoder
from mindvl_jax.models.layers.linear import LOGICAL_AXES, Linear
from mindvl_jax.models.layers.vision import normalize_patches
from mindvl_jax.models.layers.visual_tokens import place_visual
from mindvl_jax.models.mindvl.model import MindVL
from mindvl_jax.models.mindvl.vision import IMAGE_MEAN, IMAGE_STD, window_patches
from mindvl_jax.parallel.mesh import make_mesh

QUICK = {"xla_backend_optimization_level": 0}  # compilation is most of these tests' time


def losses(graph, state, batch):
    return nnx.merge(graph, state).token_losses(batch, chunk=16)


def jitted(function):
    return jax.jit(function, compiler_options=QUICK)


@pytest.fixture(scope="module")
def plain_losses(tiny):
    graph, state = tiny()
    run = jitted(lambda state, batch: losses(graph, state, batch))
    return lambda batch: run(state, batch)


@pytest.fixture(scope="module")
def plain(tiny, batch):
    """Loss and gradients without remat."""
    graph, state = tiny()
    run = jax.jit(jax.value_and_grad(lambda state, batch: losses(graph, state, batch).sum()), compiler_options=QUICK)
    return run, state, run(state, batch)


@pytest.mark.parametrize("policy", ["full", "dots", "attention"])
def test_remat_changes_no_value(tiny, policy):
    """On the decoder, whose layers and the tower's go through the same functions."""
    inputs, seed = jax.random.normal(jax.random.key(0), (2, 1, 12, 48))
    positions, ids = jnp.broadcast_to(jnp.arange(12), (1, 3, 12)), jnp.ones((1, 12), jnp.int32)

    def gradients(remat):
        graph, state = tiny(remat=remat)

        def run(state, x):
            return (nnx.merge(graph, state).language(x, positions, ids) * seed).sum()

        return jitted(jax.grad(run, argnums=(0, 1)))(state, inputs)

    plain, again = gradients("none"), gradients(policy)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        # The same sums in another order of fusion: float32 rounding only.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_text_only_batches_run_the_program_of_image_batches_without_nan(plain, batch):
    run, state, _ = plain
    compiled = run._cache_size()
    text = batch.replace(
        visual_index=jnp.full_like(batch.visual_index, -1),
        patches=jnp.zeros_like(batch.patches),
        patch_segment_ids=jnp.zeros_like(batch.patch_segment_ids),
        patch_window_ids=jnp.zeros_like(batch.patch_window_ids),
    )
    loss, grads = run(state, text)
    assert run._cache_size() == compiled and np.isfinite(loss)
    flat = {"/".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(grads)}
    assert all(np.isfinite(value).all() for value in flat.values())
    assert all(not value.any() for path, value in flat.items() if path.startswith(("vision/", "projector/"))), (
        "nothing was seen, so nothing may be learned"
    )
    assert flat["language/embed/embedding"].any()


def test_every_parameter_learns_from_a_batch_with_an_image(plain):
    _, _, (_, grads) = plain
    dead = [
        "/".join(map(str, path))
        for path, variable in nnx.to_flat_state(grads)
        if not np.asarray(variable.get_value()).any()
    ]
    assert not dead, f"no gradient reaches {dead}"


def test_segments_see_nothing_of_their_neighbours(plain_losses, batch):
    before = plain_losses(batch)
    after = plain_losses(
        batch.replace(
            tokens=batch.tokens.at[1, 0].add(1), patches=batch.patches.at[0, 0].set(255 - batch.patches[0, 0])
        )
    )
    changed = np.asarray(before != after)
    assert changed[1, :8].any() and not changed[1, 8:].any(), "a text's neighbour in the row changed"
    assert changed[0, 2:18].any() and not changed[0, :2].any() and not changed[0, 18:].any(), (
        "tokens before the image, or padding, changed"
    )


def test_padding_has_no_loss(plain_losses, batch):
    found = np.asarray(plain_losses(batch))
    assert found.dtype == np.float32 and found.shape == (2, 24)
    assert (found[np.asarray(batch.segment_ids) == 0] == 0).all() and (
        found[np.asarray(batch.segment_ids) > 0] > 0
    ).all()


def test_bounds_on_lengths_change_no_value(tiny, batch):
    graph, state = tiny()

    def run(**bounds):
        return jitted(lambda state, batch: nnx.merge(graph, state)(batch, **bounds))(state, batch)

    bounded, free = run(max_sample_length=18, max_image_patches=16), run()
    real = np.asarray(batch.segment_ids) > 0
    difference = np.abs(np.asarray(bounded - free))[real].max()
    assert difference < 1e-5, f"max difference {difference:.1e}"


def test_bfloat16_computes_in_bfloat16_and_stays_near(tiny, plain_losses, batch):
    graph, state = tiny(compute_dtype="bfloat16")
    assert jax.eval_shape(lambda batch: nnx.merge(graph, state)(batch), batch).dtype == jnp.bfloat16
    exact = np.asarray(plain_losses(batch)).sum()
    found = np.asarray(jitted(lambda state, batch: losses(graph, state, batch))(state, batch)).sum()
    # About 50 places of some 4 nats; eight significant bits a step, averaged: a hundredth is generous and NaN or a lost
    # cast is not.
    assert abs(found - exact) / exact < 1e-2, f"{found} against {exact}"


@pytest.fixture(scope="module")
def decoder(config):
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config.text, rngs=nnx.Rngs(0), dtype=jnp.float32)))
    generator = np.random.default_rng(0)
    return nnx.merge(
        graph, jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0.1, 0.2, leaf.shape), jnp.float32), state)
    )


def _filled(decoder, keys, values, lengths, places, place, unrolled):
    """Return a cache of that many slots whose rows hold the first tokens of the prefill; each row's last before
    `place`.
    """
    B = keys.shape[1]
    turned = [np.zeros((keys.shape[0], B, places, *keys.shape[3:]), np.float32) for _ in range(2)]
    for row, length in enumerate(lengths):
        at = (place - length + np.arange(length)) % places
        for store, read in zip(turned, (keys, values)):
            store[:, row, at] = np.asarray(read)[:, row, :length]
    return KVCache.empty(decoder.config, B, places, jnp.float32, unrolled=unrolled).replace_rows(
        jnp.arange(B), *map(jnp.asarray, turned)
    )


@pytest.mark.parametrize(
    "unrolled, place", [(True, 9), (False, 5)]
)  # the answers run around the end of the ring; the second prompt too
def test_extending_rows_of_different_lengths_token_by_token_equals_reading_them_at_once(decoder, unrolled, place):
    inputs = jax.random.normal(jax.random.key(0), (2, 10, 48))
    positions = jnp.broadcast_to(jnp.arange(10), (2, 3, 10))
    whole = jitted(decoder)(inputs, positions, jnp.ones((2, 10), jnp.int32))
    lengths = np.array([6, 3])
    hidden, keys, values = jitted(decoder.read)(
        inputs[:, :6], positions[..., :6], (np.arange(6)[None] < lengths[:, None]).astype(np.int32)
    )
    rows, parts = np.arange(2), [(hidden[:, :3], whole[:, :3])]
    cache = _filled(decoder, keys, values, lengths, 11, place, unrolled)
    step = jax.jit(decoder.extend, compiler_options=QUICK)
    for _ in range(4):
        new, cache = step(
            inputs[rows, lengths][:, None], positions[rows, :, lengths][..., None], cache, place, lengths + 1
        )
        parts.append((new[:, 0], whole[rows, lengths]))
        place, lengths = (place + 1) % 11, lengths + 1
    difference = max(float(jnp.abs(one - other).max()) for one, other in parts)
    assert difference < 1e-5 * float(jnp.abs(whole).max()), (
        f"max difference {difference:.1e}"
    )  # float32 sums in another order


def test_a_ring_knows_the_places_of_each_rows_newest_tokens():
    ring = KVCache((jnp.zeros((3, 1, 1, 4)),), (jnp.zeros((3, 1, 4, 1)),))
    assert ring.holds(1, jnp.array([1, 3, 9])).astype(int).tolist() == [[0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]


def test_visual_tokens_land_where_the_index_says_and_gradients_return():
    tokens, visual = jnp.zeros((2, 5, 3)), jnp.arange(24.0).reshape(2, 4, 3) + 1
    index = jnp.array([[-1, 2, 0, -1, -1], [3, -1, -1, -1, 1]])
    out = jitted(place_visual)(tokens, visual, index)
    np.testing.assert_array_equal(out[0, 1], visual[0, 2])
    np.testing.assert_array_equal(out[1, 4], visual[1, 1])
    assert not out[0, 0].any()
    seed = jax.random.normal(jax.random.key(1), out.shape)

    # Witness: the same choice as a product with a one-hot matrix, differentiated by JAX.
    def onehot(tokens, visual):
        return jnp.where(index[..., None] >= 0, jax.nn.one_hot(index, 4) @ visual, tokens)

    def pull(function):
        return jitted(lambda t, v: jax.vjp(function, t, v)[1](seed))(tokens, visual)

    for got, want in zip(pull(lambda t, v: place_visual(t, v, index)), pull(onehot), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_pixels_are_normalised_by_channel_as_published(config):
    vision = config.vision
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 1176), np.uint8)
    channels = pixels.reshape(1, 2, 3, -1).astype(np.float64) / 255
    want = (channels - np.array(IMAGE_MEAN)[:, None]) / np.array(IMAGE_STD)[:, None]
    got = normalize_patches(jnp.asarray(pixels), vision, jnp.float32)
    np.testing.assert_allclose(got, want.reshape(1, 2, 1176), atol=1e-6)
    np.testing.assert_array_equal(normalize_patches(got, vision, jnp.float32), got)
    with pytest.raises(TypeError, match="int32"):
        normalize_patches(jnp.zeros((1, 1, 1176), jnp.int32), vision, jnp.float32)


@pytest.mark.parametrize("window, patches", [(112, 64), (56, 16), (70, 16), (28, 4)])
def test_windows_hold_whole_groups(config, window, patches):
    assert window_patches(config.vision.model_copy(update=dict(window_size=window))) == patches


def test_every_axis_name_is_a_known_one(tiny):
    _graph, state = tiny()
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata()["out_sharding"]
        assert len(names) == variable.get_value().ndim and set(names) <= {*LOGICAL_AXES, None}, f"{path}: {names}"


def test_under_a_mesh_parameters_are_created_in_their_places():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    rules = [(name, {"mlp": "tensor", "embed": "fsdp"}.get(name)) for name in LOGICAL_AXES]
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        linear = nnx.jit(
            lambda: Linear(48, 64, ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0), dtype=jnp.float32, layers=2)
        )()
    assert {shard.data.shape for shard in linear.kernel.get_value().addressable_shards} == {(2, 24, 16)}
    alone = Linear(48, 64, ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0), dtype=jnp.float32, layers=2)
    np.testing.assert_allclose(linear.kernel.get_value(), alone.kernel.get_value(), atol=1e-7)


def test_a_head_dim_that_two_axes_cannot_share_is_refused(config):
    bad = config.model_copy(update=dict(vision=config.vision.model_copy(update=dict(num_heads=16))))
    with pytest.raises(ValueError, match="multiple of 4"):
        nnx.eval_shape(lambda: MindVL(bad, rngs=nnx.Rngs(0)))
