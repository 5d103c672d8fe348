"""One micro-step of a small model on any mesh: its sums and gradients, and what its program exchanges."""

import functools

import jax
import numpy as np

from mindvl_jax.config import loader
from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.planning.phase import lowerings, parts_of
from mindvl_jax.training.xla_backend import compile_xla, placement_options

# Sizes that tell what an array is: no parameter has a dim of 104, 26 or 112, no other part has the decoder's matrices.
TOKENS, CHUNK, PATCHES, WIDTH = 104, 26, 112, 64
DENSE = (
    "model.compute_dtype=float32", "model.text.num_heads=4", "model.text.num_kv_heads=2", "model.text.head_dim=24",
    "model.text.mrope_section=[4,4,4]", "model.vision.depth=2", "model.vision.fullatt_block_indexes=[1]",
    "model.vision.hidden_size=64", "model.vision.num_heads=4", "model.vision.intermediate_size=72",
    "training.phases.0.rows=4", "training.phases.0.gradient_accumulation=2",
    f"training.phases.0.sequence_length={TOKENS}",
    f"training.phases.0.patches_per_row={PATCHES}", f"training.loss_chunk={CHUNK}",
)  # fmt: skip
# Exchanges are settled before LLVM.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def configuration(axes, *settings):
    """`axes`: sizes by name. The smoke configuration with one layer kind of each sort."""
    mesh = [f"mesh.{axis}={size}" for axis, size in axes.items()]
    return loader.load("configs/smoke.yaml", [*DENSE, *settings, *mesh])


@functools.cache
def compiled(axes: tuple[tuple[str, int], ...], *settings: str):
    """-> the compiled micro-step of the first phase, and its state and batch as shapes with shardings."""
    config = configuration(dict(axes), *settings)
    devices = int(np.prod([size for _, size in axes]))
    mesh = make_mesh(MeshConfig(**dict(axes)), jax.devices()[:devices])
    programs = dict(lowerings(config, 0, mesh, functools.partial(compile_xla, **placement_options(config))))
    parts = parts_of(config, 0, mesh)
    return programs["accumulate"].compile(QUICK), parts.state, parts.batch


@functools.cache
def totals(axes: tuple[tuple[str, int], ...], *settings: str):
    """What the micro-step sums up from nothing, on the host."""
    step, state, batch = compiled(axes, *settings)
    state, batch = jax.tree_util.tree_map_with_path(made, (state, batch))
    zeros = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), step.out_info)
    return jax.tree.map(np.asarray, step(state, zeros, batch))


def made(path, like):
    """Numbers for one array of the state or the batch, the same on every mesh."""
    return jax.device_put(values(jax.tree_util.keystr(path), like), like.sharding)


def values(name: str, like) -> np.ndarray:
    """Three samples and padding in each row of tokens, two images in each row of patches, windows of 16."""
    rng = np.random.default_rng(len(name))
    size = like.shape[1] if len(like.shape) > 1 else 0
    place, rows = np.arange(size), np.arange(like.shape[0])[:, None] if like.shape else 0
    if ".segment_ids" in name:
        value = np.select([place < 21 + rows, place < 60, place < 97 - rows], [1, 2, 3], 0)
    elif "patch_segment_ids" in name:
        value = np.select([place < 48, place < 96], [1, 2], 0) + 0 * rows
    elif "patch_window_ids" in name:
        value = np.where(place < 96, place // 16 + 1, 0) + 0 * rows
    elif "segment_lengths" in name:
        ends = [21 + rows, 60 - 21 - rows, 97 - rows - 60]
        value = np.concatenate([*ends, np.full((like.shape[0], size - 3), -1)], 1)
    elif "image_lengths" in name:
        value = np.where(place < 2, 48, -1) + 0 * rows
    elif "window_lengths" in name:
        value = np.where(place < 6, 16, -1) + 0 * rows
    elif "loss_weights" in name:
        value = rng.random(like.shape) < 0.3
    elif like.dtype == np.uint8:
        value = rng.integers(0, 255, like.shape)
    elif "visual_index" in name:
        value = np.where((place >= 5) & (place < 29), place - 5, -1) + 0 * rows
    elif ".positions" in name:
        value = np.arange(like.shape[2]) % 40 * np.ones((*like.shape[:2], 1)) + np.arange(3)[:, None]
    elif "patch_positions" in name:
        value = np.stack([place % 7, place // 7], -1) + np.zeros((like.shape[0], 1, 1))
    elif "targets" in name or "tokens" in name:
        value = rng.integers(0, 2000, like.shape)
    elif like.dtype == np.float32:
        value = rng.standard_normal(like.shape) * 0.05 + ("norm" in name)
    else:
        value = np.zeros(like.shape)
    return np.broadcast_to(value, like.shape).astype(like.dtype)


def differences(got, want) -> tuple[float, float]:
    """Largest relative difference of the summed loss, and of a gradient by its L2 norm."""
    loss = abs(got.numerator - want.numerator) / abs(want.numerator)
    assert got.gradients.keys() == want.gradients.keys()
    worst = 0.0
    for path, expected in want.gradients.items():
        norm = np.linalg.norm(expected.astype(np.float64))
        assert norm > 0, f"{path} has no gradient, so nothing is compared"
        worst = max(worst, float(np.linalg.norm(got.gradients[path].astype(np.float64) - expected) / norm))
    return float(loss), worst
