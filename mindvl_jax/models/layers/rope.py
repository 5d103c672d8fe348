"""Rotary tables in float32: two-dimensional for patches, one- or three-dimensional for tokens.

B rows, T tokens, P patches, H head dim. Tables have full width H with the two halves equal, for
`ops.rotary(mode="half")`.
Angles are float32 throughout: in bfloat16 positions above 256 collapse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(width: int, theta: float) -> jax.Array:
    """(width / 2,) float32: theta ** (-2 i / width)."""
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _tables(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([sin, sin], -1)


def vision_tables(positions_BP2: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Height turns the first quarter of the pairs' frequencies, width the second (Qwen2-VL).

    Args:
      positions_BP2: (B, P, 2) integers, (height, width) in patches.

    Returns:
      cos, sin: (B, P, H) float32.
    """
    angles_BP2F = positions_BP2.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim // 2, theta)
    return _tables(angles_BP2F.reshape(*positions_BP2.shape[:2], head_dim // 2))


def text_tables(
    positions_B3T: jax.Array,
    head_dim: int,
    theta: float,
    sections: tuple[int, int, int] | None,
    *,
    interleaved: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rotary tables of the decoder.

    Args:
      positions_B3T: (B, 3, T) integers (temporal, height, width).
      sections: how many frequencies each of the three rows turns, in order (Qwen2-VL's M-RoPE); None reads row 0 only.
      interleaved: rows take turns instead (Qwen3-VL): height has frequencies 1, 4, .., width 2, 5, .., each as many as
        its section says, and time all others.

    Returns:
      cos, sin: (B, T, H) float32.
    """
    frequencies = inverse_frequencies(head_dim, theta)
    if sections is None:
        angles_BTF = positions_B3T[:, 0, :, None].astype(jnp.float32) * frequencies
    elif interleaved:
        row_F = np.zeros(head_dim // 2, int)
        for row in (1, 2):
            row_F[row : 3 * sections[row] : 3] = row
        # Every frequency is multiplied with one row's position; the other two rows add zero.
        angles_BTF = sum(
            positions_B3T[:, row, :, None].astype(jnp.float32) * jnp.where(row_F == row, frequencies, 0)
            for row in range(3)
        )
    else:
        parts, start = [], 0
        for row, count in enumerate(sections):
            parts.append(positions_B3T[:, row, :, None].astype(jnp.float32) * frequencies[start : start + count])
            start += count
        angles_BTF = jnp.concatenate(parts, -1)
    return _tables(angles_BTF)
