"""Muon for the hidden matrices, AdamW for everything else (Jordan et al. 2024; update scaled as in arXiv 2502.16982).

Momentum is orthogonalised matrix by matrix by optax's `scale_by_muon`: each layer of a stack, and query, key, value,
gate and up apart, because each is a parameter of its own here. An orthogonal update times 0.2 sqrt(max(inputs,
outputs)) has AdamW's usual root mean square, so learning rate and decay keep their meaning. Momentum in float32, no
second moment: half of AdamW's state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mindvl_jax.config.schema import OptimizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params, matches_any
from mindvl_jax.training.adamw8bit import Adam8bitState, adam8bit_state, adamw8bit
from mindvl_jax.training.optimizer import AdamState, NewValue, ParameterRule, adam_state, fused_adamw

RMS = 0.2
"""Scaled RMS of an update with all singular values 1: that of AdamW (arXiv 2502.16982, section 2.2)."""


def muon_paths(trained: Iterable[str], config: OptimizerConfig) -> frozenset[str]:
    """Parameters that Muon updates; the others are AdamW's."""
    return frozenset(path for path in trained if matches_any(path, config.muon))


def require_matrices(shapes: Mapping[str, Any], config: OptimizerConfig, where: str) -> None:
    """Refuse a Muon run without a matrix for it.

    Args:
      shapes: of the trained parameters.

    Raises:
      UserError: no trained parameter matches `training.optimizer.muon`, or one of them is a vector.
    """
    if config.name != "muon":
        return
    chosen = muon_paths(shapes, config)
    if not chosen:
        raise UserError(
            f"{where}: training.optimizer.name is muon, but none of the trained parameters is one of "
            f"training.optimizer.muon ({', '.join(config.muon)})"
        )
    if flat := sorted(path for path in chosen if len(shapes[path].shape) < 2):
        raise UserError(
            f"training.optimizer.muon selects {flat[0]} of shape {shapes[flat[0]].shape}; Muon is for matrices"
        )


def optimizer_init(config: OptimizerConfig) -> Callable[[Params], AdamState | Adam8bitState]:
    """Fresh optimizer state of the trained parameters."""
    others = {"muon": _muon_state, "adamw8bit": adam8bit_state}
    return adam_state if config.name == "adamw" else functools.partial(others[config.name], config)


def _muon_state(config: OptimizerConfig, trained: Params) -> AdamState:
    """Momentum of every parameter; second moments of those that AdamW updates alone."""
    state, chosen = adam_state(trained), muon_paths(trained, config)
    return AdamState(state.mu, {path: value for path, value in state.nu.items() if path not in chosen}, state.updates)


def optimizer_of(config: OptimizerConfig, rules: Mapping[str, ParameterRule]) -> optax.GradientTransformationExtraArgs:
    """The configured optimizer."""
    return {"adamw": fused_adamw, "adamw8bit": adamw8bit, "muon": muon}[config.name](config, rules)


def muon(config: OptimizerConfig, rules: Mapping[str, ParameterRule]) -> optax.GradientTransformationExtraArgs:
    """Muon over `config.muon`, `fused_adamw` over the rest; update arguments and results as in `fused_adamw`."""
    adamw, init = fused_adamw(config, rules), optimizer_init(config)

    def update(
        gradients: Params, state: AdamState, params: Params, *, learning_rate: jax.Array, keep: jax.Array
    ) -> tuple[dict[str, NewValue], AdamState]:
        chosen = muon_paths(params, config)
        rest = {path: value for path, value in params.items() if path not in chosen}
        updates, rest_state = adamw.update(
            gradients, AdamState(state.mu, state.nu, state.updates), rest, learning_rate=learning_rate, keep=keep
        )
        matrices = {path: params[path] for path in params if path in chosen}
        dims = {
            path: optax.contrib.MuonDimensionNumbers(value.ndim - 2, value.ndim - 1) for path, value in matrices.items()
        }
        scale_by_muon = optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=dims)
        before = scale_by_muon.init({path: state.mu[path] for path in matrices})
        before = before._replace(count=state.updates, mu={path: state.mu[path] for path in matrices})
        directions, after = scale_by_muon.update({path: gradients[path] for path in matrices}, before)
        mu = dict(rest_state.mu)
        for path, value in matrices.items():
            rule, wide = rules[path], value.astype(jnp.float32)
            step = directions[path] * (RMS * max(value.shape[-2:]) ** 0.5) + rule.weight_decay * wide
            moved = (wide - learning_rate * rule.learning_rate_factor * step).astype(value.dtype)
            updates[path] = NewValue(jnp.where(keep, moved, value))
            mu[path] = jnp.where(keep, after.mu[path], state.mu[path])
        return {path: updates[path] for path in params}, AdamState(
            {path: mu[path] for path in params}, rest_state.nu, rest_state.updates
        )

    return optax.GradientTransformationExtraArgs(init, update)
