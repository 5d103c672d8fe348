"""Learning-rate schedules and AdamW over flat parameter dicts.

The update itself is `npu_bridge.ops.fused_adamw`, so that a device with a fused kernel uses it; schedules come from optax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mindvl_jax.config.schema import OptimizerConfig, PhaseConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params, matches, matches_any, require_matches
from npu_bridge import ops


def learning_rates(phase: PhaseConfig, where: str) -> np.ndarray:
    """(phase.steps,) float32: the rate of every optimizer step of a phase, computed once, so that no step waits for it.

    Warm-up rises in equal parts to the full rate, which step `warmup_steps - 1` has (no step is wasted at rate 0); then the named
    schedule falls to `final_learning_rate_fraction` over the rest.

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
    rising = peak * (steps[:warmup] + 1) / max(1, warmup)
    falling = np.broadcast_to(np.asarray(main(steps[warmup:] - warmup)), phase.steps - warmup)
    return np.concatenate([rising, falling]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """What is particular to one parameter."""

    learning_rate_factor: float
    weight_decay: float


def parameter_rules(trained: Iterable[str], phase: PhaseConfig, optimizer: OptimizerConfig, where: str) -> dict[str, ParameterRule]:
    """Learning-rate factor and weight decay of every trained parameter.

    Raises:
      UserError: a multiplier's glob matches no trained parameter.
    """
    trained = list(trained)
    require_matches(trained, phase.learning_rate_multipliers, f"{where}.learning_rate_multipliers (trained parameters only)")
    rules = {}
    for path in trained:
        factor = next((f for glob, f in phase.learning_rate_multipliers.items() if matches(path, glob)), 1.0)
        decay = 0.0 if matches_any(path, optimizer.no_decay) else phase.weight_decay
        rules[path] = ParameterRule(factor, decay)
    return rules


def zero_moments(trained: Params) -> Params:
    """Float32 zeros beside the trained parameters: a moment before the first update."""
    return {path: jnp.zeros(value.shape, jnp.float32, device=value.sharding) for path, value in trained.items()}


def adamw(
    trained: Params,
    gradients: Params,
    mu: Params,
    nu: Params,
    *,
    count: jax.Array,
    learning_rate: jax.Array,
    keep: jax.Array,
    config: OptimizerConfig,
    rules: dict[str, ParameterRule],
) -> tuple[Params, Params, Params]:
    """One update of every trained parameter.

    Args:
      count: number of this update, from 1. learning_rate: before the parameter's factor.
      keep: bool scalar on the device; False leaves parameters and moments bitwise as they are, without a host round trip.
    """
    new_trained, new_mu, new_nu = {}, {}, {}
    for path, value in trained.items():
        rule = rules[path]
        new_trained[path], new_mu[path], new_nu[path] = ops.fused_adamw(
            value,
            gradients[path],
            mu[path],
            nu[path],
            step=count,
            learning_rate=learning_rate * rule.learning_rate_factor,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=rule.weight_decay,
            keep=keep,
        )
    return new_trained, new_mu, new_nu
