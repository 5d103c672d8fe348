"""Balancing terms of routed models, from the sums that their routers report.

L layers, E experts. Sums run over the real tokens of a micro-batch (`models.layers.moe.Routing`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mindvl_jax.models.layers.config import MoEConfig
from mindvl_jax.models.layers.moe import Routing


def balance(
    routing: Routing, config: MoEConfig, tokens: jax.Array | float, *, segments: jax.Array | float
) -> jax.Array:
    """Load-balancing loss of one micro-batch without its factor, a scalar.

    sequence: DeepSeek-V3's, the mean over packed samples, summed over layers. pooled: Hugging Face's, one loss over the
    tokens of all layers together, whose balanced value is k. layer: Megatron's, the mean over layers of a loss whose
    balanced value is 1.
    """
    if config.balance == "sequence":
        return jnp.sum(routing.sequence_balance) / segments
    load_LE, probability_LE = routing.load / tokens, routing.probability / tokens
    if config.balance == "pooled":
        return config.experts * jnp.sum(jnp.mean(load_LE, 0) * jnp.mean(probability_LE, 0))
    return config.experts / config.experts_per_token * jnp.mean(jnp.sum(load_LE * probability_LE, -1))


def z(routing: Routing, tokens: jax.Array | float) -> jax.Array:
    """Mean over tokens and layers of the squared log-partition of the router's logits."""
    return jnp.mean(routing.z) / tokens


def moved_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Update the selection bias: up by `rate` for experts below the mean load, down by it for the others."""
    mean_L1 = jnp.mean(load_LE, -1, keepdims=True)
    return bias_LE + rate * jnp.sign(mean_L1 - load_LE)
