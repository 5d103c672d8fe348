"""One optimizer step on a small stand-in model: freezing, accumulation, clipping, non-finite steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mindvl_jax.models.batch  # noqa: F401  registers Batch as a pytree
from mindvl_jax.config.schema import MeshConfig, OptimizerConfig, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, matches
from mindvl_jax.models.vision_language.batch import BatchShape
from mindvl_jax.models.vision_language.counts import COUNTS
from mindvl_jax.objectives import sft
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import replicated, row_sharding
from mindvl_jax.training.state import initial_params, split_trained, start_phase
from mindvl_jax.training.step import make_programs, program_key

WIDTH, VOCABULARY, PATCH = 8, 11, 6
SHAPE = BatchShape(rows=4, tokens=10, patches=8, samples=3, images=2, windows=2, patch_dim=PATCH)


class Part(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (inputs, outputs)) / inputs**0.5,
            out_sharding=("embed", "mlp"),
            eager_sharding=False,
        )


class StandIn(nnx.Module):
    """Tokens plus the mean patch of their row, then a product: everything that a loss needs, compiled in a moment."""

    def __init__(self, rngs):
        self.vision, self.projector = Part(PATCH, WIDTH, rngs), Part(WIDTH, WIDTH, rngs)
        self.language = Part(VOCABULARY, WIDTH, rngs)

    def token_losses(self, batch, *, chunk):
        seen = (
            jnp.tanh(batch.patches.astype(jnp.float32).mean(1) @ self.vision.kernel[...]) @ self.projector.kernel[...]
        )
        hidden = self.language.kernel[...][batch.tokens] + seen[:, None]
        logits = hidden @ self.language.kernel[...].T
        return batch.loss_weights * optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


@pytest.fixture(scope="module")
def outline():
    return Outline.of(lambda rngs: StandIn(rngs))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def make_batch(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    shape = dataclasses.replace(SHAPE, rows=rows)
    segments = np.sort(rng.integers(1, 4, (rows, 10)), axis=1).astype(np.int32)
    segments[:, 8:] = 0
    lengths = np.stack([np.bincount(row, minlength=4)[1:] for row in segments]).astype(np.int32)
    return dataclasses.replace(
        shape.empty(),
        tokens=rng.integers(0, VOCABULARY, (rows, 10)).astype(np.int32),
        targets=rng.integers(0, VOCABULARY, (rows, 10)).astype(np.int32),
        loss_weights=((segments > 0) & (rng.random((rows, 10)) < 0.7)).astype(np.float32),
        segment_ids=segments,
        segment_lengths=lengths,
        patches=rng.normal(size=(rows, 8, PATCH)).astype(np.float32),
    )


def rows_of(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


COMPILED = {}  # programs by the phase's settings, and the first parameters: the tests share them


class Harness:
    """Programs and a fresh state for one phase of the stand-in."""

    def __init__(self, outline, mesh, *, rows=4, clip=0.0, **changes):
        phase = PhaseConfig(
            **(
                {
                    "name": "p",
                    "steps": 5,
                    "mixture": ({"source": "some"},),
                    "rows": rows,
                    "sequence_length": 10,
                    "patches_per_row": 8,
                    "learning_rate": 0.1,
                }
                | changes
            )
        )
        self.mesh = mesh
        self.trained, self.frozen = split_trained(list(outline.shapes), phase.train, "train")
        spec, optimizer = dataclasses.replace(SHAPE, rows=rows).spec(), OptimizerConfig(clip_norm=clip)
        objective = sft.for_phase(phase, loss_chunk=16, counts=COUNTS)
        key = program_key(phase, objective, spec, self.trained), clip
        if key not in COMPILED:
            COMPILED[key] = make_programs(
                outline,
                phase=phase,
                objective=objective,
                optimizer=optimizer,
                spec=spec,
                trained=self.trained,
                frozen=self.frozen,
                mesh=mesh,
            )
        self.programs = COMPILED[key]
        if "params" not in COMPILED:
            COMPILED["params"] = jax.device_get(initial_params(outline, mesh, 0))
        self.params = COMPILED["params"]
        self.state = start_phase(jax.device_put(self.params, replicated(mesh)), self.trained, self.frozen, mesh)

    def step(self, batch, rate=0.1):
        self.state, metrics = self.programs.train_step(
            self.state, jax.device_put(batch, row_sharding(self.mesh)), np.float32(rate)
        )
        return {name: value.tolist() for name, value in jax.device_get(metrics).items()}

    def accumulated_step(self, batches, rate=0.1):
        totals = self.programs.zeros()
        for batch in batches:
            totals = self.programs.accumulate(self.state, totals, jax.device_put(batch, row_sharding(self.mesh)))
        self.state, metrics = self.programs.update(self.state, totals, np.float32(rate))
        return {name: value.tolist() for name, value in jax.device_get(metrics).items()}

    def bits(self):
        return {path: np.asarray(value).tobytes() for path, value in self.state.params.items()}


def test_globs_stay_inside_a_name_with_one_star_and_cross_slashes_with_two():
    assert matches("vision/blocks/mlp/kernel", "vision/**") and matches("vision/blocks/mlp/kernel", "**/kernel")
    assert (
        matches("scale", "**/scale")
        and matches("a/scale", "*/scale")
        and matches("a/b/c", "a/**/c")
        and matches("a/c", "a/**/c")
    )
    assert (
        not matches("a/b/scale", "*/scale") and not matches("visionary/x", "vision/**") and not matches("a.b", "a?c/**")
    )


def test_frozen_parts_keep_every_bit_and_have_neither_gradient_nor_moments(outline, mesh):
    harness = Harness(outline, mesh, train=("projector/**",))
    before = harness.bits()
    harness.step(make_batch())
    changed = {path for path, bits in harness.bits().items() if bits != before[path]}
    assert changed == {"projector/kernel"}
    assert set(harness.state.opt_state.mu) == set(harness.state.opt_state.nu) == {"projector/kernel"}
    totals = jax.eval_shape(harness.programs.zeros)
    assert set(totals.gradients) == {"projector/kernel"}


def test_a_glob_that_selects_nothing_is_refused_and_so_is_training_nothing(outline):
    with pytest.raises(
        UserError,
        match=r"training.phases\[0\].train:\n  'projecter/\*\*' matches no parameter; did you mean 'projector/\*\*'",
    ):
        split_trained(list(outline.shapes), ("projecter/**",), "training.phases[0].train")
    with pytest.raises(UserError, match="nothing would learn"):
        split_trained(list(outline.shapes), (), "training.phases[0].train")


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_accumulating_over_micro_steps_equals_one_large_batch(outline, mesh, reduction):
    batch = make_batch(1)
    whole = Harness(outline, mesh, loss_reduction=reduction)
    parts = Harness(outline, mesh, rows=2, gradient_accumulation=2, loss_reduction=reduction)
    one, two = whole.step(batch), parts.accumulated_step([rows_of(batch, slice(0, 2)), rows_of(batch, slice(2, 4))])
    for name in ("loss", "grad_norm", "tokens", "label_tokens", "samples", "segment_squares"):
        assert abs(one[name] - two[name]) <= 1e-6 * abs(one[name]), f"{name}: {one[name]} whole, {two[name]} in parts"
    # Compared are gradients: the first moments are 0.1 of them. Sums in another order, float32.
    worst = max(
        float(jnp.abs(whole.state.opt_state.mu[path] - parts.state.opt_state.mu[path]).max())
        for path in whole.state.opt_state.mu
    )
    assert worst < 1e-7, f"largest difference of gradients / 10: {worst:.2e}"


def test_micro_batch_reduction_is_the_mean_of_the_micro_batches_losses(outline, mesh):
    batch = make_batch(2)
    halves = [rows_of(batch, slice(0, 2)), rows_of(batch, slice(2, 4))]
    separate = [Harness(outline, mesh, rows=2).step(half)["loss"] for half in halves]
    got = Harness(outline, mesh, rows=2, gradient_accumulation=2, loss_reduction="micro_batch").accumulated_step(
        halves
    )["loss"]
    assert abs(got - np.mean(separate)) < 1e-6, f"{got} against the mean of {separate}"


def test_the_loss_and_its_gradient_agree_with_plain_jax(outline, mesh):
    batch = make_batch(3)
    harness = Harness(outline, mesh)

    def loss(params):
        hidden = (
            params["language/kernel"][batch.tokens]
            + (jnp.tanh(batch.patches.mean(1) @ params["vision/kernel"]) @ params["projector/kernel"])[:, None]
        )
        nll = -jnp.take_along_axis(
            jax.nn.log_softmax(hidden @ params["language/kernel"].T), jnp.asarray(batch.targets)[..., None], -1
        )[..., 0]
        return (nll * batch.loss_weights).sum() / batch.loss_weights.sum()

    value, gradients = jax.value_and_grad(loss)(harness.params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    metrics = harness.step(batch)
    assert abs(metrics["loss"] - float(value)) < 1e-6 and abs(metrics["grad_norm"] - norm) < 1e-6 * max(1, norm), (
        metrics,
        value,
        norm,
    )
    worst = max(float(jnp.abs(harness.state.opt_state.mu[path] - 0.1 * gradients[path]).max()) for path in gradients)
    assert worst < 1e-7, f"largest difference of first moments {worst:.2e}"


def test_clipping_scales_the_whole_gradient_to_the_norm(outline, mesh):
    free, clipped = Harness(outline, mesh), Harness(outline, mesh, clip=0.01)
    norm = free.step(make_batch(4))["grad_norm"]
    assert norm > 0.01
    assert (
        abs(clipped.step(make_batch(4))["grad_norm"] - norm) < 1e-6 * norm
    )  # what is reported is the norm before clipping
    ratio = {
        path: np.asarray(clipped.state.opt_state.mu[path]) / np.asarray(free.state.opt_state.mu[path])
        for path in free.state.opt_state.mu
    }
    worst = max(np.abs(r[np.isfinite(r)] / (0.01 / norm) - 1).max() for r in ratio.values())
    assert worst < 1e-5, f"largest relative difference {worst:.2e}"


def test_a_non_finite_step_changes_no_parameter_and_is_counted_until_a_good_one_comes(outline, mesh):
    harness = Harness(outline, mesh)
    harness.step(make_batch(5))
    before, moments = harness.bits(), jax.device_get((harness.state.opt_state.mu, harness.state.opt_state.nu))
    poisoned = make_batch(6)
    poisoned.patches[1, 2, 3] = np.nan
    first, second = harness.step(poisoned), harness.step(poisoned)
    assert (first["bad_steps"], second["bad_steps"], second["skipped_steps"], second["applied"]) == (1, 2, 2, False)
    assert harness.bits() == before
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(a, b),
            jax.device_get((harness.state.opt_state.mu, harness.state.opt_state.nu)),
            moments,
        )
    )
    good = harness.step(make_batch(7))
    assert (good["bad_steps"], good["skipped_steps"], good["applied"]) == (0, 2, True)
    assert int(harness.state.opt_state.updates) == 2 and int(harness.state.step) == 4


def test_a_step_without_any_label_changes_nothing_and_is_not_called_bad(outline, mesh):
    harness = Harness(outline, mesh, weight_decay=0.5)
    before = harness.bits()
    batch = make_batch(8)
    batch.loss_weights[:] = 0
    metrics = harness.step(batch)
    assert metrics["loss"] == 0.0 and not metrics["applied"] and metrics["finite"] and metrics["bad_steps"] == 0
    assert harness.bits() == before


def test_phases_of_one_shape_share_their_programs_whatever_their_mixture_and_schedule():
    def key(sources=("a",), **changes):
        mixture = tuple({"source": name} for name in sources)
        common = {
            "name": "p",
            "steps": 5,
            "mixture": mixture,
            "rows": 4,
            "sequence_length": 10,
            "patches_per_row": 8,
            "learning_rate": 0.1,
        }
        phase = PhaseConfig(**(common | changes))
        return program_key(phase, sft.for_phase(phase, loss_chunk=16, counts=COUNTS), SHAPE.spec(), ["w"])

    assert key() == key(
        sources=tuple("abcdefgh"), name="q", steps=9, learning_rate=0.2, schedule="cosine", warmup_steps=2
    )
    different = [
        key(sources=tuple("abcdefghi")),
        key(weight_decay=0.1),
        key(loss_reduction="sample"),
        key(learning_rate_multipliers={"w": 0.5}),
        key(layer_decay=0.9),
    ]
    assert len({key(), *different}) == 6


def test_moments_start_anew_with_a_phase_unless_they_are_kept(outline, mesh):
    harness = Harness(outline, mesh)
    harness.step(make_batch(9))
    parts = harness.trained, harness.frozen
    kept = start_phase(harness.state.params, *parts, mesh, before=harness.state, keep_optimizer=True)
    assert int(kept.opt_state.updates) == 1 and float(jnp.abs(kept.opt_state.mu["language/kernel"]).max()) > 0
    fresh = start_phase(harness.state.params, *parts, mesh, before=harness.state)
    assert int(fresh.opt_state.updates) == 0 and int(fresh.step) == 1 and int(fresh.phase_step) == 0
    assert all(not np.asarray(value).any() for value in (*fresh.opt_state.mu.values(), *fresh.opt_state.nu.values()))
    with pytest.raises(UserError, match="keep_optimizer: the phase before trained other parts"):
        start_phase(
            harness.state.params,
            ["language/kernel"],
            ["vision/kernel", "projector/kernel"],
            mesh,
            before=harness.state,
            keep_optimizer=True,
        )


def test_counts_tell_real_tokens_and_squares_of_segments(outline, mesh):
    batch = make_batch(10)
    metrics = Harness(outline, mesh).step(batch)
    lengths = [np.bincount(row[row > 0]) for row in batch.segment_ids]
    assert metrics["tokens"] == (batch.segment_ids > 0).sum()
    assert metrics["samples"] == sum((count > 0).sum() for count in lengths)
    assert metrics["segment_squares"] == sum((count.astype(float) ** 2).sum() for count in lengths)
