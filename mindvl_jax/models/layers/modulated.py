"""Parts of diffusion transformers: embeddings of numbers, modulated norms, rotary tables of coordinates.

Legend: B rows, T tokens, A axes, D width, N heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.models.layers.linear import Linear
from npu_bridge import ops

EPS = 1e-6  # of the norms of Flux and SD3
TIME_FREQUENCIES = 256  # width of the sinusoids that embed a number


def plain_norm(x_BTD: jax.Array, eps: float) -> jax.Array:
    """Layer norm without parameters."""
    D = x_BTD.shape[-1]
    return ops.layer_norm(x_BTD, jnp.ones((D,), x_BTD.dtype), jnp.zeros((D,), x_BTD.dtype), eps=eps)


def modulate(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def sinusoids(positions: jax.Array | np.ndarray, width: int, xp=jnp):
    """(..) -> (.., width) float32: cosines, then sines, of frequencies from 1 down to nearly 1 / 10000."""
    # Rounded once, from float64: at noise level 1000 an error of one frequency counts a thousandfold.
    frequencies = np.exp(-math.log(10000.0) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angles = positions[..., None].astype(xp.float32) * frequencies
    return xp.concatenate([xp.cos(angles), xp.sin(angles)], -1)


class VectorEmbedding(nnx.Module):
    """`out(silu(in(x)))`: a vector, or the sinusoids of a number, to the width of the conditions."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs, dtype):
        common = dict(bias=True, rngs=rngs, dtype=dtype)
        self.enter = Linear(inputs, width, (None, "embed"), **common)
        self.leave = Linear(width, width, ("embed", None), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.leave(jax.nn.silu(self.enter(x)))


def rotary_tables(coordinates_TA: np.ndarray, axes: Sequence[int], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), both (T, sum of axes) float32, for `ops.rotary` in mode interleaved.

    Each axis rotates its own part of a head by its own coordinate. Angles in float64: in bfloat16 neighbours merge.
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(np.repeat(coordinates_TA[:, axis, None].astype(np.float64) * frequencies, 2, -1))
    table = np.concatenate(angles, -1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
