"""Learning-rate schedules and optimizers over flat parameter dicts.

An optimizer is an optax transformation. AdamW is our own one around `npu_bridge.ops.fused_adamw`, so that a device with
a fused kernel uses it; schedules come from optax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mindvl_jax.config.schema import OptimizerConfig, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params, matches, matches_any, require_matches
from mindvl_jax.parallel.rules import STACK
from npu_bridge import ops


def learning_rates(phase: PhaseConfig, where: str) -> np.ndarray:
    """(phase.steps,) float32: the rate of every optimizer step of a phase, computed once, so that no step waits for it.

    Warm-up rises in equal parts to the full rate, which step `warmup_steps - 1` has, so that no step is wasted at rate
    0; with `warmup_from_zero` the first step has rate 0 and step `warmup_steps` the full one. Then the named schedule
    falls to `final_learning_rate_fraction` over the rest.

    Raises:
      UserError: the warm-up is longer than the phase; `where` names the phase's place in the config.
    """
    peak, warmup, final = phase.learning_rate, phase.warmup_steps, phase.final_learning_rate_fraction
    if warmup > phase.steps:
        raise UserError(f"{where} ({phase.name}): warmup_steps={warmup} is longer than the phase (steps={phase.steps})")
    rest = max(1, phase.steps - warmup)
    if phase.schedule == "cosine":
        main = optax.schedules.cosine_decay_schedule(peak, rest, alpha=final)
    elif phase.schedule == "linear":
        main = optax.schedules.linear_schedule(peak, peak * final, rest)
    else:
        main = optax.schedules.constant_schedule(peak)
    steps = np.arange(phase.steps)
    rising = peak * (steps[:warmup] + (not phase.warmup_from_zero)) / max(1, warmup)
    falling = np.broadcast_to(np.asarray(main(steps[warmup:] - warmup)), phase.steps - warmup)
    return np.concatenate([rising, falling]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """Optimizer settings of one parameter."""

    learning_rate_factor: float
    weight_decay: float


def parameter_rules(
    trained: Iterable[str], phase: PhaseConfig, optimizer: OptimizerConfig, where: str
) -> dict[str, ParameterRule]:
    """Learning-rate factor and weight decay of every trained parameter.

    Raises:
      UserError: a multiplier's glob matches no trained parameter.
    """
    trained = list(trained)
    require_matches(
        trained, phase.learning_rate_multipliers, f"{where}.learning_rate_multipliers (trained parameters only)"
    )
    rules = {}
    for path in trained:
        factor = next((f for glob, f in phase.learning_rate_multipliers.items() if matches(path, glob)), 1.0)
        decay = 0.0 if matches_any(path, optimizer.no_decay) else phase.weight_decay
        rules[path] = ParameterRule(factor, decay)
    return rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamState:
    """Optimizer state of AdamW. Field names are names in checkpoints.

    Attributes:
      mu, nu: float32 moments by parameter path.
      updates: int32, updates that these moments have seen (skipped steps do not count).
    """

    mu: Params
    nu: Params
    updates: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewValue:
    """An update that is the parameter's new value.

    A fused kernel returns that; new value minus old would round once more.
    """

    value: jax.Array


def adam_state(trained: Params) -> AdamState:
    """Zero moments beside the trained parameters."""

    def zeros() -> Params:
        return {path: jnp.zeros(value.shape, jnp.float32, device=sharding_of(value)) for path, value in trained.items()}

    # Two calls: mu and nu must not share buffers, both are donated.
    return AdamState(zeros(), zeros(), jnp.zeros((), jnp.int32))


def sharding_of(value: jax.Array) -> jax.sharding.Sharding | None:
    """Where an array lies; None while a program is traced."""
    return None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)


def fused_adamw(config: OptimizerConfig, rules: Mapping[str, ParameterRule]) -> optax.GradientTransformationExtraArgs:
    """AdamW by `npu_bridge.ops.fused_adamw`, one call a parameter.

    Its update takes, beside gradients, state and parameters: `learning_rate` (before the parameter's own factor), and
    `keep`, a bool scalar on the device; False leaves parameters and moments bitwise as they are, without a host round
    trip. Updates are `NewValue`s.
    """

    def update(
        gradients: Params, state: AdamState, params: Params, *, learning_rate: jax.Array, keep: jax.Array
    ) -> tuple[dict[str, NewValue], AdamState]:
        new, mu, nu = {}, {}, {}
        for path, value in params.items():
            rule = rules[path]
            new[path], mu[path], nu[path] = ops.fused_adamw(
                value,
                gradients[path],
                state.mu[path],
                state.nu[path],
                step=state.updates + 1,
                learning_rate=learning_rate * rule.learning_rate_factor,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=rule.weight_decay,
                keep=keep,
            )
        return {path: NewValue(value) for path, value in new.items()}, AdamState(
            mu, nu, state.updates + keep.astype(jnp.int32)
        )

    return optax.GradientTransformationExtraArgs(adam_state, update)


def apply_update(
    transformation: optax.GradientTransformationExtraArgs,
    gradients: Params,
    state: Any,
    params: Params,
    *,
    learning_rate: jax.Array,
    keep: jax.Array,
) -> tuple[Params, Any]:
    """(parameters, optimizer state) after one update, or unchanged where `keep` is False.

    Takes `fused_adamw` and any transformation of optax. Those of optax know neither `learning_rate` nor `keep`: their
    updates are scaled by the rate here, and their state is selected.
    """
    updates, new_state = optax.with_extra_args_support(transformation).update(
        gradients, state, params, learning_rate=learning_rate, keep=keep
    )
    if all(isinstance(update, NewValue) for update in updates.values()):
        return {path: update.value for path, update in updates.items()}, new_state
    rate = {path: jnp.asarray(learning_rate, jnp.float32) * update for path, update in updates.items()}
    moved = optax.apply_updates(params, rate)

    def choose(new, old):
        return jnp.where(keep, new, old)

    return jax.tree.map(choose, moved, params), jax.tree.map(choose, new_state, state)


def with_layer_decay(
    new: Params, old: Params, axis_names: Mapping[str, Sequence[str | None] | None], decay: float
) -> Params:
    """Shorten the updates of early layers: layer l of a stack of L moves by decay ** (L - 1 - l) of its update.

    Every optimizer here moves a parameter by the rate times something that does not depend on it, so this is a rate of
    its own for each layer, but for one more rounding.
    """

    def shortened(path: str, value: jax.Array) -> jax.Array:
        if (axis_names.get(path) or (None,))[0] != STACK:
            return value
        factors = decay ** np.arange(len(value) - 1, -1, -1, dtype=np.float32)
        before = old[path].astype(jnp.float32)
        moved = before + factors.reshape(-1, *[1] * (value.ndim - 1)) * (value.astype(jnp.float32) - before)
        return moved.astype(value.dtype)

    return new if decay == 1 else {path: shortened(path, value) for path, value in new.items()}
