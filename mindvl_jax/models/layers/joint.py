"""Attention over several streams, each with weights of its own: text and image of Flux and SD3.

Legend: B rows, T tokens, D width, F feed-forward width, N heads, H head dim, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.linear import Linear, RMSNorm
from mindvl_jax.models.layers.modulated import EPS, modulate, plain_norm
from mindvl_jax.models.layers.stack import keep
from npu_bridge import ops


class Rotary(NamedTuple):
    """Tables (B, T, H) float32 of the joint sequence."""

    cos: jax.Array
    sin: jax.Array


class Projections(nnx.Module):
    """Queries, keys and values of one stream; the first two normalised per head with `qk_norm`."""

    def __init__(self, D: int, *, heads: int, qk_norm: bool, layers: int | None, rngs: nnx.Rngs, dtype):
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=layers)
        self.head_dim = D // heads
        self.query = Linear(D, D, ("embed", "heads"), **common)
        self.key = Linear(D, D, ("embed", "heads"), **common)
        self.value = Linear(D, D, ("embed", "heads"), **common)
        norm = dict(eps=EPS, dtype=dtype, name=None, layers=layers)
        self.query_norm = RMSNorm(self.head_dim, **norm) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, **norm) if qk_norm else None

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def heads(layer: Linear) -> jax.Array:
            return keep(layer(x_BTD)).reshape(*x_BTD.shape[:2], -1, self.head_dim)

        query, key, value = (heads(layer) for layer in (self.query, self.key, self.value))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value


def attend(query: jax.Array, key: jax.Array, value: jax.Array, rotary: Rotary | None) -> jax.Array:
    """(B, T, N, H) each -> (B, T, N * H)."""
    if rotary is not None:
        query, key = (ops.rotary(x, rotary.cos, rotary.sin, mode="interleaved") for x in (query, key))
    out_BTNH = ops.attention(query, key, value, causal=False)
    return keep(out_BTNH.reshape(*out_BTNH.shape[:2], -1))


def chunks(x_BK: jax.Array, count: int) -> list[jax.Array]:
    return jnp.split(x_BK, count, -1)


class Stream(nnx.Module):
    """One stream's weights of a joint block."""

    def __init__(self, D: int, *, heads: int, qk_norm: bool, layers: int | None, rngs: nnx.Rngs, dtype):
        F, common = 4 * D, dict(bias=True, rngs=rngs, dtype=dtype, layers=layers)
        self.modulation = Linear(D, 6 * D, ("embed", None), **common)
        self.projections = Projections(D, heads=heads, qk_norm=qk_norm, layers=layers, rngs=rngs, dtype=dtype)
        self.output = Linear(D, D, ("heads", "embed"), **common)
        self.up = Linear(D, F, ("embed", "mlp"), **common)
        self.down = Linear(F, D, ("mlp", "embed"), **common)

    def finish(self, x: jax.Array, attended: jax.Array, gate1, shift2, scale2, gate2) -> jax.Array:
        x = x + gate1[:, None] * self.output(attended)
        hidden = ops.gelu(keep(self.up(modulate(plain_norm(x, EPS), shift2, scale2))), approximate=True)
        return x + gate2[:, None] * self.down(keep(hidden))
