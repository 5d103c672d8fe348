"""One optimizer step as pure functions of (state, batch), compiled once for each phase.

A step without accumulation is one program. With accumulation it is three: `zeros`, `accumulate` (each micro-step, adds to gradient
totals) and `update`. The state changes only in `update`, so a run that is cut between micro-steps still has the state of the last
step, whole. Nothing here waits for the device: a non-finite step is undone by a select inside the program.

Legend: B rows, T tokens, P patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindvl_jax.data.batch import Batch, BatchShape
from mindvl_jax.config.schema import OptimizerConfig, PhaseConfig
from mindvl_jax.parallel.rules import replicated, row_sharding
from mindvl_jax.training import losses
from mindvl_jax.training.backend import compile_xla
from mindvl_jax.training.optimizer import adamw, parameter_rules
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.training.state import TrainState, state_shardings
from npu_bridge import ops

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the micro-steps of one optimizer step.

    Attributes:
      gradients: of the loss numerator, by path, in float32.
      numerator, denominator: of the loss (see `losses.loss_terms`), float32.
      counts: what the batches held, float32 each (see `batch_counts`).
      sources: (K, 2) float32, sums of losses and of weights by source of the mixture, for display; rows past the last source are 0.
    """

    gradients: Params
    numerator: jax.Array
    denominator: jax.Array
    counts: dict[str, jax.Array]
    sources: jax.Array


COUNTS = ("tokens", "label_tokens", "samples", "patches", "segment_squares", "image_squares", "window_squares")


def batch_counts(batch: Batch) -> dict[str, jax.Array]:
    """What the global batch holds: real tokens, labelled tokens, samples, real patches, and the sums of squared lengths that the
    attention of each kind works on. Float32: exact up to 2^24, and only for display and FLOPs."""

    def squares(lengths):
        return jnp.sum(jnp.square(jnp.maximum(lengths, 0).astype(jnp.float32)))

    def count(mask):
        return jnp.sum(mask.astype(jnp.float32))

    return {
        "tokens": count(batch.segment_ids > 0),
        "label_tokens": count(batch.loss_weights > 0),
        "samples": count(batch.segment_lengths > 0),
        "patches": count(batch.patch_segment_ids > 0),
        "segment_squares": squares(batch.segment_lengths),
        "image_squares": squares(batch.image_lengths),
        "window_squares": squares(batch.window_lengths),
    }


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The compiled programs of one phase.

    Attributes:
      train_step: (state, batch, learning_rate) -> (state, metrics); donates the state. For one micro-step a step.
      zeros: () -> totals.
      accumulate: (state, totals, batch) -> totals; donates the totals, leaves the state.
      update: (state, totals, learning_rate) -> (state, metrics); donates the state.
      shardings: of the state.
    """

    train_step: Callable[[TrainState, Batch, np.float32], tuple[TrainState, Metrics]]
    zeros: Callable[[], Totals]
    accumulate: Callable[[TrainState, Totals, Batch], Totals]
    update: Callable[[TrainState, Totals, np.float32], tuple[TrainState, Metrics]]
    shardings: TrainState


def _source_rows(phase: PhaseConfig) -> int:
    """K: the phase's sources, rounded up to eights, so that phases of other mixtures run the same programs."""
    return -(-len(phase.sources) // 8) * 8


def program_key(phase: PhaseConfig, shape: BatchShape, trained: Sequence[str]) -> tuple:
    """What of a phase stands in its programs: phases with equal keys run the same compiled code."""
    return (
        shape,
        _source_rows(phase),
        tuple(trained),
        phase.loss_reduction,
        phase.weight_decay,
        tuple(phase.learning_rate_multipliers.items()),
        phase.max_sample_length,
        phase.max_image_patches,
    )


def make_programs(
    outline: Outline,
    *,
    phase: PhaseConfig,
    optimizer: OptimizerConfig,
    shape: BatchShape,
    trained: Sequence[str],
    frozen: Sequence[str],
    mesh: Mesh,
    loss_chunk: int,
    where: str = "training.phases[?]",
    compile: Callable[..., Callable] = compile_xla,
) -> StepPrograms:
    """Builds the programs of a phase; nothing is compiled before its first call.

    The learning rate is an argument, so that phases which differ in schedule or mixture alone share their programs (see `program_key`).

    Raises:
      UserError: a multiplier does not fit the phase.
    """
    rules = parameter_rules(trained, phase, optimizer, where)
    sources = _source_rows(phase)
    # Promises for banded attention; a bound that equals the row promises nothing.
    bounds = {"max_sample_length": phase.max_sample_length, "max_image_patches": phase.max_image_patches}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}

    def loss_numerator(trained_params: Params, frozen_params: Params, batch: Batch):
        model = outline.merge({**trained_params, **frozen_params})
        token_losses_BT = model.token_losses(batch, chunk=loss_chunk, **bounds)
        with jax.named_scope("reduce_loss"):
            numerator, denominator = losses.loss_terms(
                token_losses_BT, batch.loss_weights, batch.segment_ids, samples=shape.samples, reduction=phase.loss_reduction
            )
            return numerator, (denominator, losses.by_source(token_losses_BT, batch.loss_weights, batch.source_ids, sources))

    def micro_step(state: TrainState, batch: Batch) -> Totals:
        # Differentiates the trained parts alone: no gradient of a frozen part ever exists.
        (numerator, (denominator, by_source)), gradients = jax.value_and_grad(loss_numerator, has_aux=True)(state.trained, state.frozen, batch)
        gradients = {path: gradient.astype(jnp.float32) for path, gradient in gradients.items()}
        return Totals(gradients, numerator, denominator, batch_counts(batch), by_source)

    def zeros() -> Totals:
        gradients = {path: jnp.zeros(outline.shapes[path].shape, jnp.float32) for path in trained}
        nothing = jnp.zeros((), jnp.float32)
        return Totals(gradients, nothing, nothing, dict.fromkeys(COUNTS, nothing), jnp.zeros((sources, 2), jnp.float32))

    def accumulate(state: TrainState, totals: Totals, batch: Batch) -> Totals:
        return jax.tree.map(jnp.add, totals, micro_step(state, batch))

    def update(state: TrainState, totals: Totals, learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
        with jax.named_scope("optimizer"):
            has_labels = totals.denominator > 0
            divisor = jnp.where(has_labels, totals.denominator, 1.0)
            loss = totals.numerator / divisor
            norm = ops.global_norm(totals.gradients) / divisor
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            keep = finite & has_labels
            scale = 1.0 / divisor
            if optimizer.clip_norm > 0:
                scale = scale * jnp.where(norm > optimizer.clip_norm, optimizer.clip_norm / norm, 1.0)
            gradients = {path: gradient * scale for path, gradient in totals.gradients.items()}
            new_trained, mu, nu = adamw(
                state.trained,
                gradients,
                state.mu,
                state.nu,
                count=state.updates + 1,
                learning_rate=learning_rate,
                keep=keep,
                config=optimizer,
                rules=rules,
            )
        bad = (~finite).astype(jnp.int32)
        new_state = TrainState(
            trained=new_trained,
            frozen=state.frozen,
            mu=mu,
            nu=nu,
            updates=state.updates + keep.astype(jnp.int32),
            step=state.step + 1,
            phase_step=state.phase_step + 1,
            bad_steps=(state.bad_steps + bad) * bad,
            skipped=state.skipped + bad,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "applied": keep,
            "finite": finite,
            "bad_steps": new_state.bad_steps,
            "skipped_steps": new_state.skipped,
            "sources": totals.sources,
            **totals.counts,
        }
        return new_state, metrics

    def train_step(state: TrainState, batch: Batch, learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, micro_step(state, batch), learning_rate)

    states = state_shardings(outline, trained, frozen, mesh)
    scalar, rows = replicated(mesh), row_sharding(mesh)
    totals = Totals(gradients=states.trained, numerator=scalar, denominator=scalar, counts=dict.fromkeys(COUNTS, scalar), sources=scalar)
    return StepPrograms(
        train_step=compile(train_step, in_shardings=(states, rows, scalar), out_shardings=(states, scalar), donate_argnums=(0,)),
        zeros=compile(zeros, in_shardings=(), out_shardings=totals),
        accumulate=compile(accumulate, in_shardings=(states, totals, rows), out_shardings=totals, donate_argnums=(1,)),
        # The totals have no successor that could take their buffers; the caller drops them.
        update=compile(update, in_shardings=(states, totals, scalar), out_shardings=(states, scalar), donate_argnums=(0,)),
        shardings=states,
    )
