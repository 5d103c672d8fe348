"""Multi-head latent attention of DeepSeek-V3 (reference: transformers' DeepseekV3Attention, DeepSeek's inference code).

B rows, T tokens, S cache slots, N heads, R latent width, C nope and P rotary part of a query head, J value head dim, D
width, L layers.

Keys and values of all heads come from one latent of width R, and one rotary key of width P is shared by the heads.
Training makes keys and values (un-absorbed). Decoding folds the up-projections into query and output (absorbed), so the
cache holds R + P values a token and layer.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, YarnConfig
from mindvl_jax.models.layers.linear import Linear, RMSNorm
from mindvl_jax.models.layers.rope import inverse_frequencies
from mindvl_jax.models.layers.stack import keep
from npu_bridge import ops


def yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's attention factor: 0.1 m ln(factor) + 1, 1 where nothing is scaled."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 and mscale else 1.0


def yarn_frequencies(width: int, theta: float, yarn: YarnConfig) -> jax.Array:
    """(width / 2,) float32: fast frequencies as they are, slow ones divided by the factor, a ramp between."""

    def dim_of(rotations: float) -> float:
        return (
            width * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), width - 1)
    ramp = jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0, 1)
    plain = inverse_frequencies(width, theta)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def rotary_tables(positions_B3T: jax.Array, config: DeepSeekV3TextConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, T, P) float32 for neighbouring pairs, from the first row of the positions."""
    width, yarn = config.qk_rope_head_dim, config.yarn
    frequencies = (
        inverse_frequencies(width, config.rope_theta)
        if yarn is None
        else yarn_frequencies(width, config.rope_theta, yarn)
    )
    angles_BTP = jnp.repeat(positions_B3T[:, 0, :, None].astype(jnp.float32) * frequencies, 2, -1)
    if yarn is None:
        factor = 1.0
    elif yarn.mscale_all_dim:
        factor = yarn_scale(yarn.factor, yarn.mscale) / yarn_scale(yarn.factor, yarn.mscale_all_dim)
    else:
        factor = yarn_scale(yarn.factor, 1.0)
    return jnp.cos(angles_BTP) * factor, jnp.sin(angles_BTP) * factor


def softmax_scale(config: DeepSeekV3TextConfig) -> float:
    """1 / sqrt(C + P), times the square of YaRN's factor over all dims."""
    yarn = config.yarn
    return config.qk_head_dim**-0.5 * (1.0 if yarn is None else yarn_scale(yarn.factor, yarn.mscale_all_dim) ** 2)


class LatentAttention(nnx.Module):
    """Projections of latent attention; the caller attends."""

    def __init__(self, config: DeepSeekV3TextConfig, *, rngs: nnx.Rngs, dtype, layers: int):
        self.config = config
        D, N = config.hidden_size, config.num_heads
        common = dict(bias=False, rngs=rngs, dtype=dtype, layers=layers)
        query_inputs = D if config.q_lora_rank is None else config.q_lora_rank
        if config.q_lora_rank is None:
            self.query_down = self.query_norm = None
        else:
            self.query_down = Linear(D, config.q_lora_rank, ("embed", None), **common)
            self.query_norm = RMSNorm(
                config.q_lora_rank, eps=config.rms_norm_eps, dtype=dtype, name=None, layers=layers
            )
        self.query_up = Linear(
            query_inputs,
            N * config.qk_head_dim,
            ("embed" if config.q_lora_rank is None else "latent", "heads"),
            **common,
        )
        self.latent_down = Linear(D, config.cache_width, ("embed", None), **common)
        self.latent_norm = RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps, dtype=dtype, name=None, layers=layers)
        self.latent_up = Linear(
            config.kv_lora_rank, N * (config.qk_nope_head_dim + config.v_head_dim), ("latent", "heads"), **common
        )
        self.output = Linear(
            N * config.v_head_dim, D, ("heads", "embed"), scale=1 / math.sqrt(2 * config.num_layers), **common
        )

    def queries(self, x_BTD, cos_BTP, sin_BTP) -> tuple[jax.Array, jax.Array]:
        """-> (B, T, N, C) and, rotated, (B, T, N, P)."""
        config = self.config
        inputs = x_BTD if self.query_down is None else self.query_norm(self.query_down(x_BTD))
        q_BTNH = keep(self.query_up(inputs)).reshape(*x_BTD.shape[:2], config.num_heads, config.qk_head_dim)
        nope, rotary = q_BTNH[..., : config.qk_nope_head_dim], q_BTNH[..., config.qk_nope_head_dim :]
        return nope, ops.rotary(rotary, cos_BTP, sin_BTP, mode="interleaved")

    def latents(self, x_BTD, cos_BTP, sin_BTP) -> tuple[jax.Array, jax.Array]:
        """-> normed latent (B, T, R) and rotated shared key (B, T, P): what a cache keeps."""
        rank = self.config.kv_lora_rank
        joint_BTX = keep(self.latent_down(x_BTD))
        shared_BTP = ops.rotary(joint_BTX[:, :, None, rank:], cos_BTP, sin_BTP, mode="interleaved")[:, :, 0]
        return self.latent_norm(joint_BTX[..., :rank]), shared_BTP

    def keys_and_values(self, latent_BTR, shared_BTP) -> tuple[jax.Array, jax.Array]:
        """-> keys (B, T, N, C + P) and values (B, T, N, J) of every head."""
        config = self.config
        made = keep(self.latent_up(latent_BTR)).reshape(*latent_BTR.shape[:2], config.num_heads, -1)
        nope, values = made[..., : config.qk_nope_head_dim], made[..., config.qk_nope_head_dim :]
        shared = jnp.broadcast_to(shared_BTP[:, :, None], (*nope.shape[:3], shared_BTP.shape[-1]))
        return jnp.concatenate([nope, shared], -1), values

    def finish(self, out_BTNJ) -> jax.Array:
        return self.output(keep(out_BTNJ.reshape(*out_BTNJ.shape[:2], -1)))

    def attend_absorbed(self, nope_BNC, rotary_BNP, latent_BSR, shared_BSP, seen_BS) -> jax.Array:
        """One query a row over cached latents -> (B, N, J). Softmax and sums in float32.

        score = (q_nope W_uk) . latent + q_rotary . shared key; output = (sum of weights x latent) W_uv.
        """
        config = self.config
        up_RNX = self.latent_up.kernel[...].reshape(config.kv_lora_rank, config.num_heads, -1)
        keys_RNC, values_RNJ = up_RNX[..., : config.qk_nope_head_dim], up_RNX[..., config.qk_nope_head_dim :]
        wide = dict(preferred_element_type=jnp.float32)
        query_BNR = jnp.einsum("bnc,rnc->bnr", nope_BNC, keys_RNC.astype(nope_BNC.dtype), **wide)
        scores_BNS = jnp.einsum("bnr,bsr->bns", query_BNR, latent_BSR.astype(jnp.float32), **wide)
        scores_BNS += jnp.einsum("bnp,bsp->bns", rotary_BNP.astype(jnp.float32), shared_BSP.astype(jnp.float32), **wide)
        weights_BNS = jax.nn.softmax(jnp.where(seen_BS[:, None], scores_BNS * softmax_scale(config), -jnp.inf), -1)
        mixed_BNR = jnp.einsum("bns,bsr->bnr", weights_BNS, latent_BSR.astype(jnp.float32), **wide)
        return jnp.einsum("bnr,rnj->bnj", mixed_BNR, values_RNJ.astype(jnp.float32), **wide).astype(nope_BNC.dtype)
