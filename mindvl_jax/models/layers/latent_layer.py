"""One layer of DeepSeek-V3: latent attention, and a dense or routed feed-forward.

B rows, T tokens, D width; R width of a latent, P of a shared rotary key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.config import DeepSeekV3TextConfig
from mindvl_jax.models.layers.decoder import self_attention
from mindvl_jax.models.layers.linear import GatedMLP, RMSNorm
from mindvl_jax.models.layers.mla import LatentAttention, softmax_scale
from mindvl_jax.models.layers.moe import MoE


class LatentLayer(nnx.Module):
    """Pre-norm latent attention and a dense or routed feed-forward."""

    def __init__(self, config: DeepSeekV3TextConfig, *, routed: bool, layers: int, rngs: nnx.Rngs, dtype):
        D = config.hidden_size
        norm = dict(eps=config.rms_norm_eps, dtype=dtype, layers=layers)
        self.norm1 = RMSNorm(D, **norm)
        self.attention = LatentAttention(config, rngs=rngs, dtype=dtype, layers=layers)
        self.norm2 = RMSNorm(D, **norm)
        if routed:
            self.moe = MoE(config.moe, D, rngs=rngs, dtype=dtype, layers=layers, depth=config.num_layers)
        else:
            scale = (2 * config.num_layers) ** -0.5
            self.mlp = GatedMLP(
                D, config.intermediate_size, bias=False, rngs=rngs, dtype=dtype, layers=layers, residual_scale=scale
            )

    def attend(self, x_BTD, tables, segment_ids_BT, segment_lengths, max_sample_length) -> tuple[jax.Array, ...]:
        """Un-absorbed -> what the layer adds (B, T, D), and what a cache keeps: latents (B, T, R), shared keys
        (B, T, P).
        """
        attention = self.attention
        inputs = self.norm1(x_BTD)
        nope, rotary = attention.queries(inputs, *tables)
        latents, shared = attention.latents(inputs, *tables)
        k, v = attention.keys_and_values(latents, shared)
        q, scale = jnp.concatenate([nope, rotary], -1), softmax_scale(attention.config)
        out = self_attention(q, k, v, segment_ids_BT, segment_lengths, max_sample_length, scale=scale)
        return attention.finish(out), latents, shared

    def feed_forward(self, x_BTD) -> jax.Array:
        """For decoding, where nobody balances."""
        inputs = self.norm2(x_BTD)
        if hasattr(self, "moe"):
            with jax.named_scope("moe"):
                return x_BTD + self.moe(inputs, None)[0]
        with jax.named_scope("mlp"):
            return x_BTD + self.mlp(inputs)
