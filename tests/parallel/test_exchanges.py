"""Collectives of a compiled training step on eight CPU devices: those of hand-written FSDP, HSDP and tensor
parallelism.

On a CPU XLA sums a gradient on all devices and cuts its shard out where TPU and GPU scatter it: all-reduces of whole
weights stand here for reduce-scatters.
"""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mindvl_jax.config import loader
from mindvl_jax.config.schema import BridgeConfig, MeshConfig
from mindvl_jax.parallel.activations import Placement, tracing, within_rows
from mindvl_jax.parallel.exchanges import Exchange, exchanges
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.planning.phase import lowerings, parts_of
from mindvl_jax.training.bridge_backend import program_of
from mindvl_jax.training.xla_backend import compile_xla
from npu_bridge import ops

# Sizes that tell what an array is: no parameter has a dim of 104, 26 or 112, no other part has the decoder's matrices.
TOKENS, CHUNK, PATCHES, WIDTH = 104, 26, 112, 64
ACTIVATION_DIMS = {TOKENS, CHUNK, PATCHES}
SETTINGS = [
    "model.remat=full",
    "model.compute_dtype=float32",
    "model.text.num_heads=4",
    "model.text.num_kv_heads=2",
    "model.text.head_dim=24",
    "model.text.mrope_section=[4,4,4]",
    "model.vision.depth=1",
    "model.vision.fullatt_block_indexes=[0]",
    "model.vision.hidden_size=56",
    "model.vision.intermediate_size=72",
    "training.phases.0.rows=8",
    f"training.phases.0.sequence_length={TOKENS}",
    f"training.phases.0.patches_per_row={PATCHES}",
    f"training.loss_chunk={CHUNK}",
]
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # exchanges are settled before LLVM


@functools.cache
def compiled_step(*sizes: int):
    """-> the compiled step of the first phase, and its arguments as shapes with shardings."""
    config = loader.load("configs/smoke.yaml", SETTINGS)
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), jax.devices()[: int(np.prod(sizes))]
    )
    ((_, lowered),) = lowerings(config, 0, mesh, compile_xla)
    parts = parts_of(config, 0, mesh)
    return lowered.compile(QUICK), parts.state, parts.batch


def step_exchanges(*sizes: int) -> list[Exchange]:
    return exchanges(compiled_step(*sizes)[0].as_text())


def floats(found, kind):
    return [e for e in found if e.kind == kind and e.is_float]


def of_activations(found):
    return [e for e in found if e.is_float and len(e.shape) > 1 and ACTIVATION_DIMS & set(e.shape)]


def layer_matrices(tensor):
    """The seven matrices of a decoder layer as one device multiplies them, in either orientation."""
    heads, key_heads, hidden = 96 // tensor, 48 // tensor, 128 // tensor
    return Counter(
        {tuple(sorted((WIDTH, heads))): 2, tuple(sorted((WIDTH, key_heads))): 2, tuple(sorted((WIDTH, hidden))): 3}
    )


def matrices(found, kind, tensor):
    shapes = Counter(tuple(sorted(e.shape)) for e in floats(found, kind))
    return Counter({shape: shapes[shape] for shape in layer_matrices(tensor)})


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_each_matrix_of_a_layer_is_gathered_once_forward_and_once_back(sizes):
    assert matrices(step_exchanges(*sizes), "all-gather", sizes[2]) == layer_matrices(sizes[2]) + layer_matrices(
        sizes[2]
    )


def test_fsdp_exchanges_no_activation_but_the_embeddings_columns_for_rows():
    found = step_exchanges(1, 8, 1)
    others = [e for e in of_activations(found) if e.kind != "all-to-all"]
    assert not others, "\n".join(map(str, others))
    changed = of_activations(found)
    assert len(changed) == 2 and all(e.shape[-1] * 8 == WIDTH for e in changed), "one forward, one back: " + "; ".join(
        map(str, changed)
    )


def test_fsdp_sums_each_gradient_of_a_layer_once():
    assert matrices(step_exchanges(1, 8, 1), "all-reduce", 1) == layer_matrices(1)


def test_the_head_is_gathered_once_and_its_gradient_exchanged_once_however_many_chunks_the_loss_has():
    for sizes in ((1, 8, 1), (2, 2, 2)):
        found = step_exchanges(*sizes)
        vocabulary = loader.load("configs/smoke.yaml", SETTINGS).model.text.vocab_size // sizes[2]
        of_whole = Counter(e.kind for e in found if sorted(e.shape) == [WIDTH, vocabulary])
        of_shard = Counter(e.kind for e in found if sorted(e.shape) == [WIDTH // sizes[1], vocabulary])
        if sizes[2] == 1:
            assert (of_whole, of_shard) == ({"all-gather": 1}, {"reduce-scatter": 1})
        else:
            assert of_whole == {"all-gather": 1, "all-reduce": 1}
        inside = [e for e in found if "loss" in e.scope and "/while/" in e.scope and vocabulary in e.shape]
        assert not inside, "\n".join(map(str, inside))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (8, 1, 1)], ids=str)
def test_a_head_that_is_gathered_inside_gives_the_losses_and_gradients_of_one_device(sizes):
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16, WIDTH), (WIDTH, 128)))
    targets, weights = rng.integers(0, 128, (8, 16)), rng.random((8, 16)).astype(np.float32)
    names = ("data", "fsdp", "tensor")
    mesh = make_mesh(MeshConfig(**dict(zip(names, sizes, strict=True))), jax.devices()[:8])

    def loss(hidden, targets, weights, head):
        return ops.cross_entropy(hidden, head, targets, weights, chunk=4)

    def total(hidden, head):
        return within_rows(loss, (hidden, targets, weights), (head,), [("embed", "vocab")]).sum()

    step = jax.value_and_grad(total, (0, 1))
    alone = jax.jit(step)(hidden, head)
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    apart = jax.jit(tracing(step, Placement(mesh)))(hidden, jax.device_put(head, place))
    for ours, theirs in zip(jax.tree.leaves(apart), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_hybrid_sharding_gathers_in_a_group_and_sums_shards_between_groups():
    """HSDP, data 2 x fsdp 4: whole gradients are summed in a group of four (which scatters on TPU and GPU), and each
    device's quarter once between the groups.
    """
    found = step_exchanges(2, 4, 1)
    assert matrices(found, "all-gather", 1) == layer_matrices(1) + layer_matrices(1)
    assert matrices(found, "all-reduce", 1) == layer_matrices(1)
    quarters = Counter(
        tuple(sorted((WIDTH // 4, *(size for size in shape if size != WIDTH))))
        for shape in layer_matrices(1).elements()
    )
    found_quarters = Counter(tuple(sorted(e.shape)) for e in floats(found, "all-reduce"))
    assert {shape: found_quarters[shape] for shape in quarters} == quarters
    assert not [e for e in of_activations(found) if e.kind != "all-to-all"]


def test_sequence_parallel_norms_gather_and_scatter_and_sum_no_activation():
    """On the bridge, fsdp 2 x tensor 2 with full rematerialisation. Of each layer: a gather before each of the two
    blocks forward, again, and of the gradient of each block's output; a scatter behind each block forward, behind the
    first again, and of the gradient of each block's input.

    The gradients of key and value change columns for places: a fraction of the residual stream's width, they are
    cheaper moved than the sums of their products.
    """
    config = loader.load("configs/smoke.yaml", [*SETTINGS, "parallel.sequence_norms=true"])
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    program = functools.partial(program_of, BridgeConfig(device="cpu"), parallel=config.parallel)
    ((_, lowered),) = lowerings(config, 0, mesh, functools.partial(program, mesh=mesh))
    layers = config.model.text.num_layers
    found = Counter(
        (c["kind"], c["shape"])
        for c in lowered.collectives()
        if c["times"] == layers and c["axes"] == ("tensor",) and len(c["shape"]) == 3
    )
    assert found == {
        ("all_gather", (4, TOKENS, WIDTH)): 6,
        ("reduce_scatter", (4, TOKENS, WIDTH)): 5,
        ("all_to_all", (4, TOKENS, 24)): 2,
    }


def test_data_parallelism_exchanges_gradients_and_scalars_alone():
    found = step_exchanges(8, 1, 1)
    assert not [e for e in found if e.is_float and e.kind != "all-reduce"]
    assert not of_activations(found)


def test_tensor_parallelism_sums_two_block_outputs_forward_one_of_them_again_and_the_input_gradients():
    """Rows lie on data 2 x fsdp 2, so 2 of 8 on a device.

    Of the gradients of one input XLA on a CPU sums each product's (two of the feed-forward, three of attention), where
    TPU, GPU and the bridge add them first.
    """
    found = [e for e in step_exchanges(2, 2, 2) if e.is_float and e.shape[1:2] == (TOKENS,) and "language" in e.scope]
    assert {(e.kind, e.shape) for e in found} == {("all-reduce", (2, TOKENS, WIDTH))}, "\n".join(map(str, found))
    forward = [e for e in found if "transpose(" not in e.scope]
    assert len(forward) == 2, "\n".join(map(str, forward))
    assert len(found) <= 2 + 1 + 5, "\n".join(map(str, found))


def made(path, like):
    """Numbers for one array of the state or the batch, the same on every mesh."""
    name, rng = jax.tree_util.keystr(path), np.random.default_rng(len(jax.tree_util.keystr(path)))
    size = like.shape[1] if len(like.shape) > 1 else 0
    if "segment_ids" in name or "window_ids" in name:
        value = np.broadcast_to(np.arange(size) // 16 + 1, like.shape)
    elif "loss_weights" in name:
        value = rng.random(like.shape) < 0.3
    elif like.dtype == np.uint8:
        value = rng.integers(0, 255, like.shape)
    elif "visual_index" in name:
        value = np.where(np.arange(size) < 28, np.arange(size), -1) * np.ones(like.shape)
    elif "targets" in name or "tokens" in name:
        value = rng.integers(0, 2000, like.shape)
    else:
        value = (
            rng.standard_normal(like.shape) * 0.05
            if like.dtype == np.float32 and "nu" not in name
            else np.zeros(like.shape)
        )
    return jax.device_put(value.astype(like.dtype), like.sharding)


def test_loss_and_gradient_norm_on_eight_devices_are_those_of_one():
    metrics = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        step, state, batch = compiled_step(*sizes)
        arguments = jax.tree_util.tree_map_with_path(made, (state, batch))
        metrics.append(step(*arguments, np.float32(1e-3))[1])
    for name in ("loss", "grad_norm"):
        one, eight = (float(m[name]) for m in metrics)
        # The same float32 sums in another order; a device's own rows come first.
        assert one > 0 and abs(one - eight) <= 1e-5 * one, f"{name}: {one} on one device, {eight} on eight"
