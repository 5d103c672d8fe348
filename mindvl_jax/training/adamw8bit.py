"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2021, arXiv 2110.02861).

A moment is the code of a value between -1 and 1 (`nu`: 0 and 1) times the largest magnitude of its block. A block is
256 neighbours of a row (the last dimension), the last one of a row shorter where the width is no multiple. Blocks
depend on the parameter alone, so every mesh computes the same bits, and a checkpoint of one mesh goes on on another.

Arithmetic is in float32; a stack of layers is updated layer by layer, so that the float32 moments of one layer alone
are in memory. Arrays without weight decay (norms, biases) and those below 4,096 values keep float32 moments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mindvl_jax.config.schema import OptimizerConfig
from mindvl_jax.core.params import Params, matches_any
from mindvl_jax.training.optimizer import AdamState, NewValue, ParameterRule, adam_state, fused_adamw, sharding_of
from npu_bridge import ops

BLOCK = 256
SMALLEST = 4096
"""Arrays with fewer values keep float32 moments: blocks would save nothing there."""


def dynamic_table(signed: bool) -> np.ndarray:
    """(256,) float32, ascending: the paper's dynamic data type (section 1.3).

    A leading one of the 7 bits behind the sign chooses the power of ten, 1 to 1e-6; the bits after it divide 0.1 to 1
    evenly, at the middles of the intervals. Unsigned: the sign's bit is one more bit of the fraction. Zero and 1 are
    values of their own.
    """
    positive = []
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        positive.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(positive)
    values = [*positive, *(-positive if signed else []), 0.0, 1.0]
    return np.sort(np.array(values)).astype(np.float32)


SIGNED, UNSIGNED = dynamic_table(True), dynamic_table(False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adam8bitState:
    """Optimizer state. Field names are names in checkpoints.

    Attributes:
      mu, nu: moments by parameter path; uint8 codes of the parameter's shape, or float32 (see `in_8_bits`).
      mu_absmax, nu_absmax: float32 (.., blocks of a row), of the parameters in 8 bits alone.
      updates: int32, updates that these moments have seen (skipped steps do not count).
    """

    mu: Params
    nu: Params
    mu_absmax: Params
    nu_absmax: Params
    updates: jax.Array


def in_8_bits(shapes: Mapping[str, jax.Array], config: OptimizerConfig) -> frozenset[str]:
    """Paths whose moments are kept in 8 bits."""
    return frozenset(
        path
        for path, value in shapes.items()
        if value.ndim >= 2 and math.prod(value.shape) >= SMALLEST and not matches_any(path, config.no_decay)
    )


def encode(values: jax.Array, table: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(codes uint8 (.., F), absmax float32 (.., blocks)) of moments (.., F): the nearest value of the table.

    In the unsigned table a moment above zero never becomes zero: the update divides by its root.
    """
    width = values.shape[-1]
    blocks = -(-width // BLOCK)
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, blocks * BLOCK - width)])
    absmax = jnp.max(jnp.abs(padded.reshape(*values.shape[:-1], blocks, BLOCK)), axis=-1)
    relative = values / _of_each(jnp.maximum(absmax, 1e-12), width)
    bounds = jnp.asarray((table[1:] + table[:-1]) / 2)
    codes = jnp.searchsorted(bounds, relative, side="right", method="scan_unrolled").astype(jnp.uint8)
    if table[0] == 0:
        codes = jnp.where(values > 0, jnp.maximum(codes, jnp.uint8(1)), codes)
    return codes, absmax


def decode(codes: jax.Array, absmax: jax.Array, table: np.ndarray) -> jax.Array:
    """The float32 moments (.., F) of `encode`."""
    values = jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    return values * _of_each(absmax, codes.shape[-1])


def _of_each(absmax: jax.Array, width: int) -> jax.Array:
    """(.., blocks) to (.., width): of each value its block's."""
    return jnp.repeat(absmax, BLOCK, axis=-1)[..., :width]


def adam8bit_state(config: OptimizerConfig, trained: Params) -> Adam8bitState:
    """Zero moments beside the trained parameters."""
    chosen = in_8_bits(trained, config)
    plain = adam_state({path: value for path, value in trained.items() if path not in chosen})
    zero = {False: int(np.flatnonzero(UNSIGNED == 0)[0]), True: int(np.flatnonzero(SIGNED == 0)[0])}

    def codes(signed: bool) -> Params:
        return {
            path: jnp.full(value.shape, zero[signed], jnp.uint8, device=sharding_of(value))
            for path, value in trained.items()
            if path in chosen
        }

    def absmax() -> Params:
        return {path: jnp.zeros(_absmax_shape(trained[path].shape), jnp.float32) for path in sorted(chosen)}

    def in_order(moments: Params) -> Params:
        return {path: moments[path] for path in trained}

    mu, nu = in_order({**plain.mu, **codes(True)}), in_order({**plain.nu, **codes(False)})
    return Adam8bitState(mu, nu, absmax(), absmax(), plain.updates)


def _absmax_shape(shape: Iterable[int]) -> tuple[int, ...]:
    *lead, width = shape
    return (*lead, -(-width // BLOCK))


def adamw8bit(config: OptimizerConfig, rules: Mapping[str, ParameterRule]) -> optax.GradientTransformationExtraArgs:
    """AdamW with moments in 8 bits; update arguments and results as in `fused_adamw`."""
    adamw = fused_adamw(config, rules)

    def update(
        gradients: Params, state: Adam8bitState, params: Params, *, learning_rate: jax.Array, keep: jax.Array
    ) -> tuple[dict[str, NewValue], Adam8bitState]:
        rest = {path: value for path, value in params.items() if path not in state.mu_absmax}
        updates, plain = adamw.update(
            gradients, AdamState(state.mu, state.nu, state.updates), rest, learning_rate=learning_rate, keep=keep
        )
        mu, nu = dict(plain.mu), dict(plain.nu)
        mu_absmax, nu_absmax = {}, {}
        for path in state.mu_absmax:
            rule = rules[path]
            one = functools.partial(
                _matrix_update,
                config=config,
                step=state.updates + 1,
                learning_rate=learning_rate * rule.learning_rate_factor,
                weight_decay=rule.weight_decay,
                keep=keep,
            )
            own = (params[path], state.mu[path], state.mu_absmax[path], state.nu[path], state.nu_absmax[path])
            value, mu[path], mu_absmax[path], nu[path], nu_absmax[path] = _by_layer(one, own, gradients[path])
            updates[path] = NewValue(value)
        return {path: updates[path] for path in params}, Adam8bitState(
            {path: mu[path] for path in state.mu}, {path: nu[path] for path in state.nu}, mu_absmax, nu_absmax,
            plain.updates,
        )  # fmt: skip

    return optax.GradientTransformationExtraArgs(functools.partial(adam8bit_state, config), update)


def _by_layer(one, own: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    """Update a stack (L, .., F) in place, one layer after the other; a single matrix at once."""
    if gradient.ndim < 3:
        return one(own, gradient)

    def layer(number, arrays):
        def of_layer(array):
            return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)

        new = one(tuple(map(of_layer, arrays)), of_layer(gradient))
        return tuple(
            jax.lax.dynamic_update_index_in_dim(array, value, number, 0)
            for array, value in zip(arrays, new, strict=True)
        )

    return jax.lax.fori_loop(0, gradient.shape[0], layer, own)


def _matrix_update(own, gradient, *, config: OptimizerConfig, step, learning_rate, weight_decay, keep):
    """(value, mu, mu_absmax, nu, nu_absmax) after one update; every bit as before where `keep` is False."""
    value, mu, mu_absmax, nu, nu_absmax = own
    moved, new_mu, new_nu = ops.fused_adamw(
        value,
        gradient,
        decode(mu, mu_absmax, SIGNED),
        decode(nu, nu_absmax, UNSIGNED),
        step=step,
        learning_rate=learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=weight_decay,
        keep=keep,
    )
    new = (moved, *encode(new_mu, SIGNED), *encode(new_nu, UNSIGNED))
    return tuple(jnp.where(keep, after, before) for after, before in zip(new, own, strict=True))
