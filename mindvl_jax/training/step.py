"""One optimizer step as pure functions of (state, batch), compiled once for each phase.

A step without accumulation is one program. With accumulation it is three: `zeros`, `accumulate` (each micro-step, adds
to gradient totals) and `update`. The state changes only in `update`, so a run that is cut between micro-steps still has
the state of the last step, whole. Nothing here waits for the device: a non-finite step is undone by a select inside the
program.

The step knows no field of a batch: what is learned from it, and what is counted, is the objective's
(`mindvl_jax.objectives`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindvl_jax.config.schema import OptimizerConfig, PhaseConfig
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.objectives.base import Objective
from mindvl_jax.parallel.rules import batch_sharding, replicated
from mindvl_jax.training.muon import optimizer_init, optimizer_of
from mindvl_jax.training.optimizer import apply_update, parameter_rules, with_layer_decay
from mindvl_jax.training.state import TrainState, spread_shardings, state_shardings
from mindvl_jax.training.xla_backend import compile_xla
from npu_bridge import ops

Metrics = dict[str, jax.Array]
STEP_METRICS = ("loss", "grad_norm", "learning_rate", "applied", "finite", "bad_steps", "skipped_steps")
"""Metrics that every step reports, besides those of the objective."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the micro-steps of one optimizer step.

    Attributes:
      gradients: of the loss numerator, by path, in float32.
      numerator, denominator, metrics, aux: see `objectives.base.LossTerms`.
    """

    gradients: Params
    numerator: jax.Array
    denominator: jax.Array
    metrics: Metrics
    aux: Any


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

    train_step: Callable[[TrainState, Any, np.float32], tuple[TrainState, Metrics]]
    zeros: Callable[[], Totals]
    accumulate: Callable[[TrainState, Totals, Any], Totals]
    update: Callable[[TrainState, Totals, np.float32], tuple[TrainState, Metrics]]
    shardings: TrainState


PART_NORM = "grad_norm/"
"""Prefix of the metrics with the gradient norm of each part of the model."""


def by_part(params: Params) -> dict[str, Params]:
    """Return parameters by the first name of their paths: vision, projector, language."""
    parts: dict[str, Params] = {}
    for path, value in params.items():
        parts.setdefault(path.split("/")[0], {})[path] = value
    return parts


def program_key(phase: PhaseConfig, objective: Objective, spec: BatchSpec, trained: Sequence[str]) -> tuple:
    """Key of a phase's programs: phases with equal keys share compiled code."""
    rates = tuple(phase.learning_rate_multipliers.items()), phase.layer_decay
    return spec, objective, tuple(trained), phase.weight_decay, *rates


def make_programs(
    outline: Outline,
    *,
    phase: PhaseConfig,
    objective: Objective,
    optimizer: OptimizerConfig,
    spec: BatchSpec,
    trained: Sequence[str],
    frozen: Sequence[str],
    mesh: Mesh,
    seed: int = 0,
    where: str = "training.phases[?]",
    compile: Callable[..., Callable] = compile_xla,
) -> StepPrograms:
    """Build the programs of a phase; nothing is compiled before its first call.

    The learning rate is an argument, so that phases which differ in schedule or mixture alone share their programs (see
    `program_key`).

    Args:
      seed: of the random key; in the programs only if the objective uses one.

    Raises:
      UserError: a multiplier does not fit the phase.
    """
    transformation = optimizer_of(optimizer, parameter_rules(trained, phase, optimizer, where))

    def spread(arrays: Params) -> Params:
        """Arrays beside parameters where the optimizer's lie; as they are where these lie with the parameters."""
        if not optimizer.shard_over_data:
            return arrays
        # Twice: told the last layout alone, the partitioner spreads the work of the loss by it.
        settled = {path: jax.lax.with_sharding_constraint(x, states.trained[path]) for path, x in arrays.items()}
        return {path: jax.lax.with_sharding_constraint(x, of_gradients[path]) for path, x in settled.items()}

    def loss_numerator(trained_params: Params, frozen_params: Params, batch: Any, key: jax.Array | None):
        terms = objective.loss(outline.merge({**trained_params, **frozen_params}), batch, key)
        return terms.numerator, terms

    def micro_step(state: TrainState, batch: Any) -> Totals:
        # No micro-step number in the key: a sample's random numbers must not depend on how a step is cut into
        # micro-steps.
        key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.uses_key else None
        # Differentiates the trained parts alone: no gradient of a frozen part ever exists.
        (_, terms), gradients = jax.value_and_grad(loss_numerator, has_aux=True)(
            state.trained, state.frozen, batch, key
        )
        gradients = spread({path: gradient.astype(jnp.float32) for path, gradient in gradients.items()})
        return Totals(gradients, terms.numerator, terms.denominator, terms.metrics, terms.aux)

    def zeros() -> Totals:
        gradients = {path: jnp.zeros(outline.shapes[path].shape, jnp.float32) for path in trained}
        nothing = jnp.zeros((), jnp.float32)
        metrics = {name: jnp.zeros(shape, jnp.float32) for name, shape in objective.metric_shapes.items()}
        aux = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), objective.aux_shapes)
        return Totals(gradients, nothing, nothing, metrics, aux)

    def accumulate(state: TrainState, totals: Totals, batch: Any) -> Totals:
        return jax.tree.map(jnp.add, totals, micro_step(state, batch))

    def update(state: TrainState, totals: Totals, learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
        with jax.named_scope("optimizer"):
            has_labels = totals.denominator > 0
            divisor = jnp.where(has_labels, totals.denominator, 1.0)
            loss = totals.numerator / divisor
            norms = {part: ops.global_norm(own) / divisor for part, own in by_part(totals.gradients).items()}
            # Not from the parts' norms: another order of the sum would change the clipping, and so the bits of every
            # later loss.
            norm = ops.global_norm(totals.gradients) / divisor
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            keep = finite & has_labels
            scale = 1.0 / divisor
            if optimizer.clip_norm > 0:
                scale = scale * jnp.where(norm > optimizer.clip_norm, optimizer.clip_norm / norm, 1.0)
            gradients = {path: gradient * scale for path, gradient in totals.gradients.items()}
            new_trained, opt_state = apply_update(
                transformation,
                gradients,
                state.opt_state,
                spread(state.trained),
                learning_rate=learning_rate,
                keep=keep,
            )
            new_trained = with_layer_decay(new_trained, state.trained, outline.axis_names, phase.layer_decay)
            new_trained = spread(new_trained)  # each device updates its share; the results are gathered, not the update
            if totals.aux is not None:
                changed = objective.after_update(new_trained, totals.aux)
                new_trained = {
                    path: value if value is new_trained[path] else jnp.where(keep, value, new_trained[path])
                    for path, value in changed.items()
                }
        bad = (~finite).astype(jnp.int32)
        new_state = TrainState(
            trained=new_trained,
            frozen=state.frozen,
            opt_state=opt_state,
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
            **{f"{PART_NORM}{part}": value for part, value in norms.items()},
            **totals.metrics,
        }
        return new_state, metrics

    def train_step(state: TrainState, batch: Any, learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, micro_step(state, batch), learning_rate)

    states, scalar = (
        state_shardings(
            outline, trained, frozen, mesh, init=optimizer_init(optimizer), spread=optimizer.shard_over_data
        ),
        replicated(mesh),
    )
    of_gradients = spread_shardings(states.trained, outline.shapes) if optimizer.shard_over_data else states.trained
    batches = spec.map(lambda field: batch_sharding(field.dims, field.shape, mesh))
    totals = Totals(
        gradients=of_gradients,
        numerator=scalar,
        denominator=scalar,
        metrics=dict.fromkeys(objective.metric_shapes, scalar),
        aux=jax.tree.map(lambda like: scalar, objective.aux_shapes),
    )
    return StepPrograms(
        train_step=compile(
            train_step, in_shardings=(states, batches, scalar), out_shardings=(states, scalar), donate_argnums=(0,)
        ),
        zeros=compile(zeros, in_shardings=(), out_shardings=totals),
        accumulate=compile(
            accumulate, in_shardings=(states, totals, batches), out_shardings=totals, donate_argnums=(1,)
        ),
        # The totals have no successor that could take their buffers; the caller drops them.
        update=compile(
            update, in_shardings=(states, totals, scalar), out_shardings=(states, scalar), donate_argnums=(0,)
        ),
        shardings=states,
    )
