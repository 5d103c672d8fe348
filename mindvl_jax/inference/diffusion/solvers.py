"""Solvers of flows from noise (level 1) to data (level 0): tables in float64 on the host, one `lax.scan` over their
rows.

B samples, X shape of one sample, S steps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(x (B, *X) float32, noise levels (B,) float32) -> direction from data to noise (B, *X) float32."""


def noise_levels(steps: int, shift: float = 1.0) -> np.ndarray:
    """(S + 1,) float64: levels from 1 down to 0, evenly spaced, then shifted as in training.

    Raises:
      ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"{steps} steps with shift {shift}: expected at least one step and a positive shift")
    levels = np.linspace(1.0, 0.0, steps + 1)
    return shift * levels / (1 + (shift - 1) * levels)


def euler(velocity: Velocity, noise: jax.Array, levels: np.ndarray) -> jax.Array:
    """Data (B, *X) float32 from noise at level `levels[0]`: x += (next level - level) * velocity(x, level)."""
    levels = np.asarray(levels, np.float64)
    table = (jnp.asarray(levels[:-1], jnp.float32), jnp.asarray(np.diff(levels), jnp.float32))

    def step(x: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        level, change = row
        return x + change * velocity(x, jnp.broadcast_to(level, (len(x),))), None

    return jax.lax.scan(step, noise.astype(jnp.float32), table)[0]


def guided(
    conditional: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    condition: jax.Array,
    nothing: jax.Array,
    scale: float,
) -> Velocity:
    """Classifier-free guidance: nothing + scale * (condition - nothing), both in one batch of twice the size; scale 1
    asks once.

    Args:
      conditional: (x, levels, conditions) -> velocity.
      nothing: the condition that stands for none, shaped like `condition`.
    """
    if scale == 1.0:
        return lambda x, levels: conditional(x, levels, condition)
    both = jnp.concatenate([condition, nothing])

    def velocity(x: jax.Array, levels: jax.Array) -> jax.Array:
        with_condition, without = jnp.split(
            conditional(jnp.concatenate([x, x]), jnp.concatenate([levels, levels]), both), 2
        )
        return without + scale * (with_condition - without)

    return velocity
