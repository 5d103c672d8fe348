"""The diffusion transformer and flow matching: against torch written by hand, over meshes, micro-batches and through
the bridge.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import npu_bridge
from mindvl_jax.config.schema import FlowMatchingConfig, MeshConfig, OptimizerConfig, PhaseConfig
from mindvl_jax.inference.diffusion.images import generate, grid
from mindvl_jax.inference.diffusion.solvers import guided, noise_levels, solve, table
from mindvl_jax.models.dit.config import DiTConfig
from mindvl_jax.models.dit.processor import batch_spec, from_patches, to_patches
from mindvl_jax.models.outline import outline_of
from mindvl_jax.objectives.paths import STRAIGHT
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import batch_sharding, parameter_shardings
from mindvl_jax.training.state import start_phase
from mindvl_jax.training.step import make_programs

CONFIG = DiTConfig(
    image_size=8,
    patch_size=2,
    channels=3,
    classes=("a", "b", "c"),
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    compute_dtype="float32",
)
ROWS = 8
PHASE = PhaseConfig(
    name="p",
    steps=3,
    mixture=({"source": "some"},),
    rows=ROWS,
    sequence_length=16,
    max_samples_per_row=1,
    learning_rate=1e-2,
)
OBJECTIVE = make_objective(CONFIG, PHASE, flow=FlowMatchingConfig(shift=2.0, condition_dropout=0.4))


@pytest.fixture(scope="module")
def params():
    """All parameters random: at the start the zero ones hide most of the model."""
    shapes = outline_of(CONFIG).shapes
    return {
        path: np.random.default_rng(index).normal(0, 0.2, s.shape).astype(np.float32)
        for index, (path, s) in enumerate(shapes.items())
    }


def make_batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    batch = batch_spec(CONFIG, rows).empty()
    batch["pixels"][:] = rng.integers(0, 256, batch["pixels"].shape)
    batch["labels"][:], batch["numbers"][:] = rng.integers(0, 3, rows), 1000 * seed + np.arange(rows)
    batch["weights"][:] = 1.0
    batch["weights"][-1] = 0.0  # a row without an image
    return batch


def torch_velocity(p, x, times, labels):
    """The model written out in torch, layer by layer."""
    D, N, eps = CONFIG.hidden_size, CONFIG.num_heads, CONFIG.layer_norm_eps

    def linear(x, name, layer=None):
        kernel, bias = p[f"{name}/kernel"], p[f"{name}/bias"]
        return x @ (kernel if layer is None else kernel[layer]) + (bias if layer is None else bias[layer])

    def sinusoids(at, width):
        angles = (
            at[:, None]
            * torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=torch.float64) / (width // 2)).float()
        )
        return torch.cat([angles.cos(), angles.sin()], -1)

    def norm(x):
        return F.layer_norm(x, (D,), eps=eps)

    side = torch.arange(16)
    x = linear(x, "patch_embed") + torch.cat([sinusoids(side // 4, D // 2), sinusoids(side % 4, D // 2)], -1)
    c = (
        linear(F.silu(linear(sinusoids(times * 1000, 256), "condition/time_in")), "condition/time_out")
        + p["condition/classes"][labels]
    )
    for layer in range(CONFIG.num_layers):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(F.silu(c), "blocks/modulation", layer)[:, None].chunk(
            6, -1
        )
        y = norm(x) * (1 + scale1) + shift1
        q, k, v = (
            linear(y, f"blocks/{name}", layer).unflatten(-1, (N, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        x = x + gate1 * linear(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2), "blocks/output", layer
        )
        y = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(F.gelu(linear(y, "blocks/up", layer), approximate="tanh"), "blocks/down", layer)
    shift, scale = linear(F.silu(c), "head_modulation")[:, None].chunk(2, -1)
    return linear(norm(x) * (1 + scale) + shift, "head")


def test_loss_and_every_gradient_equal_torch_written_by_hand(params):
    batch, key = make_batch(), jax.random.key(5)
    noise, times, withheld = (torch.from_numpy(np.array(x)) for x in OBJECTIVE.draw(key, batch["numbers"], (16, 12)))
    assert 0 < withheld.sum() < ROWS, "some classes are withheld and some are not"

    def loss(params):
        terms = OBJECTIVE.loss(outline_of(CONFIG).merge(params), batch, key)
        return terms.numerator / terms.denominator

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)

    theirs = {path: torch.from_numpy(x.copy()).requires_grad_() for path, x in params.items()}
    clean = torch.from_numpy(batch["pixels"]).float() / 127.5 - 1
    level = times[:, None, None]
    labels = torch.where(withheld, 3, torch.from_numpy(batch["labels"])).long()
    errors = (
        (torch_velocity(theirs, (1 - level) * clean + level * noise, times, labels) - (noise - clean))
        .square()
        .mean((1, 2))
    )
    weights = torch.from_numpy(batch["weights"])
    wanted = (weights * errors).sum() / weights.sum()
    wanted.backward()
    assert abs(float(value) - wanted.item()) < 1e-5 * wanted.item(), (float(value), wanted.item())
    largest = max(float(x.grad.abs().max()) for x in theirs.values())
    for path, gradient in gradients.items():
        want = theirs[path].grad.numpy()
        # A bias of the keys changes no softmax: its gradient is zero but for rounding, which is held against the
        # others.
        scale = largest if path == "blocks/key/bias" else np.abs(want).max()
        difference = np.abs(np.asarray(gradient) - want).max() / scale
        assert difference < 1e-4, f"{path}: relative difference {difference:.2e}"


def steps(params, devices, mesh, accumulation=1, compile=None):
    """Losses and parameters after three optimizer steps of the same eight images each.

    Epsilon is large: AdamW would turn gradients that are rounding alone (the keys' bias) into steps of full length.
    """
    mesh, outline = make_mesh(MeshConfig(**mesh), jax.devices()[:devices]), outline_of(CONFIG)
    rows = ROWS // accumulation
    phase = PHASE.model_copy(update=dict(rows=rows, gradient_accumulation=accumulation))
    spec, trained = batch_spec(CONFIG, rows), list(outline.shapes)
    options = {} if compile is None else {"compile": compile}
    programs = make_programs(
        outline,
        phase=phase,
        objective=OBJECTIVE,
        optimizer=OptimizerConfig(eps=1e-4),
        spec=spec,
        trained=trained,
        frozen=[],
        mesh=mesh,
        seed=3,
        **options,
    )
    placed = jax.device_put(
        params, parameter_shardings(outline.axis_names, {path: x.shape for path, x in params.items()}, mesh)
    )
    state, losses = start_phase(placed, trained, [], mesh), []
    shardings = spec.map(lambda field: batch_sharding(field.dims, field.shape, mesh))
    for number in range(3):
        whole = make_batch(number)
        parts = [{name: x[start : start + rows] for name, x in whole.items()} for start in range(0, ROWS, rows)]
        parts = [jax.device_put(part, shardings) if compile is None else part for part in parts]
        if accumulation == 1:
            state, metrics = programs.train_step(state, parts[0], np.float32(1e-2))
        else:
            totals = programs.zeros()
            for part in parts:
                totals = programs.accumulate(state, totals, part)
            state, metrics = programs.update(state, totals, np.float32(1e-2))
        losses.append(float(np.asarray(metrics["loss"])))
    return losses, {path: np.asarray(value) for path, value in state.trained.items()}


@pytest.fixture(scope="module")
def one_device(params):
    return steps(params, 1, {})


def assert_close(got, one_device, what):
    # float32, sums in another order, three steps of AdamW.
    worst = max(abs(a - b) / b for a, b in zip(got[0], one_device[0], strict=True))
    moved = max(float(np.abs(got[1][path] - one_device[1][path]).max()) for path in got[1])
    assert worst < 2e-5 and moved < 5e-4, f"{what}: losses differ by {worst:.2e}, parameters by {moved:.2e}"


def test_eight_devices_and_micro_batches_give_the_steps_of_one_device(params, one_device):
    assert len(set(one_device[0])) == 3
    assert_close(steps(params, 8, {"data": 2, "fsdp": 2, "tensor": 2}), one_device, "data 2, fsdp 2, tensor 2")
    assert_close(steps(params, 1, {}, accumulation=4), one_device, "four micro-batches")


def test_the_bridge_gives_the_steps_of_xla(params, one_device):
    def through_bridge(function, *, in_shardings, out_shardings, donate_argnums=()):
        return npu_bridge.jit(function, device="cpu", donate_argnums=donate_argnums)

    assert_close(steps(params, 1, {}, compile=through_bridge), one_device, "npu_bridge")


def test_the_random_numbers_of_a_sample_follow_from_its_number_and_the_step_alone():
    numbers = np.array([7, 3, 12, 5], np.int32)
    key = jax.random.fold_in(jax.random.key(0), 4)
    together = jax.jit(OBJECTIVE.draw, static_argnums=2)(key, numbers, (16, 12))
    for row, number in enumerate(numbers):
        alone = OBJECTIVE.draw(key, numbers[row : row + 1], (16, 12))
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True)), f"sample {number}"
    other = OBJECTIVE.draw(jax.random.fold_in(jax.random.key(0), 5), numbers, (16, 12))
    assert not np.array_equal(together[0], other[0]) and len(np.unique(np.asarray(together[1]))) == 4


def test_patches_are_those_written_out_and_come_back_as_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    patches = to_patches(Image.fromarray(pixels), CONFIG)
    assert np.array_equal(patches[6], pixels[2:4, 4:6].reshape(-1)), "patch 6 is row 1, column 2"
    assert np.array_equal(from_patches(patches[None], CONFIG)[0], pixels)


def test_euler_follows_the_formula_in_float64_and_reaches_the_data_of_a_straight_flow():
    levels = noise_levels(7, shift=3.0)
    wanted = [3 * (1 - k / 7) / (1 + 2 * (1 - k / 7)) for k in range(8)]
    np.testing.assert_allclose(levels, wanted, atol=1e-15)
    noise, data = np.float32([[1.0, -2.0]]), np.float32([[0.25, 3.0]])
    rows = table("euler", STRAIGHT, levels)
    straight = solve(lambda x, level: jnp.asarray(noise - data), jnp.asarray(noise), rows)
    np.testing.assert_allclose(straight, data, atol=1e-6)
    decay = solve(lambda x, level: x * level[:, None], jnp.asarray(noise), rows)
    expected = noise.astype(np.float64)
    for now, then in itertools.pairwise(wanted):
        expected = expected + (then - now) * expected * now
    np.testing.assert_allclose(decay, expected, rtol=1e-6)


def test_guidance_mixes_both_predictions_and_scale_one_asks_once():
    asked = []

    def conditional(x, levels, labels):
        asked.append(len(x))
        return x * 0 + labels[:, None].astype(jnp.float32)

    x, levels, labels, none = jnp.zeros((2, 1)), jnp.ones(2), jnp.array([1, 2]), jnp.array([9, 9])
    np.testing.assert_allclose(
        guided(conditional, labels, none, 3.0)(x, levels), [[9 + 3 * (1 - 9)], [9 + 3 * (2 - 9)]]
    )
    np.testing.assert_allclose(guided(conditional, labels, none, 1.0)(x, levels), [[1], [2]])
    assert asked == [4, 2]


def test_an_image_does_not_depend_on_how_many_are_made_at_a_time(params):
    model = outline_of(CONFIG).merge(params)
    together = generate(model, [0, 1, 2, 1, 0], steps=3, batch=5)
    apart = generate(model, [0, 1, 2, 1, 0], steps=3, batch=2)
    assert together.shape == (5, 8, 8, 3) and int(np.abs(together.astype(int) - apart).max()) <= 1
    assert not np.array_equal(together[0], together[4]), "equal classes, other noise"
    with pytest.raises(ValueError, match=r"labels \[3\] are not in 0 .. 2"):
        generate(model, [3])
    assert grid(together, 2).shape == (28, 19, 3)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be a multiple of patch_size"):
        DiTConfig(**{**CONFIG.model_dump(), "image_size": 9})
    assert CONFIG.phase_problems(PHASE) == {}
    assert "must be 16" in CONFIG.phase_problems(PHASE.model_copy(update=dict(sequence_length=20)))["sequence_length"]
    assert dataclasses.replace(OBJECTIVE, condition_dropout=0.0) == OBJECTIVE.for_validation()
