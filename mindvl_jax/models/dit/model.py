"""Diffusion transformer with adaptive layer norms (Peebles and Xie, "Scalable Diffusion Models with Transformers";
DiT).

Legend: B rows (images), P patches, C numbers a patch, D width, F feed-forward width, N heads, H head dim, K modulation
vectors.

Conditions (noise level and class) enter through the modulation alone: every layer derives shift, scale and gate vectors
from them. The modulation and the output are zero at the start, so each layer begins as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.models.dit.config import DiTConfig
from mindvl_jax.models.layers.linear import Linear, parameter
from mindvl_jax.models.layers.modulated import TIME_FREQUENCIES, modulate, plain_norm, sinusoids
from mindvl_jax.models.layers.stack import keep, rematerialise_attention, scan_layers
from npu_bridge import ops

TIME_SCALE = 1000.0  # noise levels 0 .. 1 are embedded as 0 .. 1000, like the steps of the published models


def zero_linear(
    inputs: int, outputs: int, names: tuple[str | None, str | None], *, dtype, layers: int | None = None
) -> Linear:
    """A `Linear` with bias whose parameters start at 0."""
    return Linear(inputs, outputs, names, bias=True, rngs=nnx.Rngs(0), dtype=dtype, layers=layers, scale=0.0)


def position_table(side: int, width: int) -> np.ndarray:
    """(side * side, width) float32: half of the width for the row of a patch, half for its column."""
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.concatenate([sinusoids(axis.ravel(), width // 2, np) for axis in (row, column)], -1)


class ConditionEmbedding(nnx.Module):
    """Noise level and class -> one vector an image."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype):
        D = config.hidden_size
        common = dict(bias=True, rngs=rngs, dtype=dtype)
        self.time_in = Linear(TIME_FREQUENCIES, D, (None, "embed"), **common)
        self.time_out = Linear(D, D, ("embed", None), **common)
        # One row more than there are classes: the class of guidance without a class.
        self.classes = parameter(
            jax.random.normal(rngs.params(), (len(config.classes) + 1, D), dtype) * 0.02, (None, "embed")
        )

    def __call__(self, times_B: jax.Array, labels_B: jax.Array, dtype) -> jax.Array:
        # Sinusoids in float32: bfloat16 merges neighbouring noise levels.
        time_BD = self.time_out(
            jax.nn.silu(self.time_in(sinusoids(times_B * TIME_SCALE, TIME_FREQUENCIES).astype(dtype)))
        )
        return time_BD + ops.embedding(self.classes[...], labels_B[:, None])[:, 0].astype(dtype)


class Block(nnx.Module):
    """Self-attention and feed-forward, each modulated before and gated after; stacked over layers."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype):
        D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
        self.heads, self.eps = config.num_heads, config.layer_norm_eps
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=L)
        self.query = Linear(D, D, ("embed", "heads"), **common)
        self.key = Linear(D, D, ("embed", "heads"), **common)
        self.value = Linear(D, D, ("embed", "heads"), **common)
        self.output = Linear(D, D, ("heads", "embed"), **common)
        self.up = Linear(D, F, ("embed", "mlp"), **common)
        self.down = Linear(F, D, ("mlp", "embed"), **common)
        self.modulation = zero_linear(D, 6 * D, ("embed", None), dtype=dtype, layers=L)

    def attend(self, x_BPD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
        x_BPD = modulate(plain_norm(x_BPD, self.eps), shift_BD, scale_BD)

        def heads(layer):
            return keep(layer(x_BPD)).reshape(*x_BPD.shape[:2], self.heads, -1)

        out_BPNH = ops.attention(heads(self.query), heads(self.key), heads(self.value), causal=False)
        return self.output(keep(out_BPNH.reshape(x_BPD.shape)))

    def feed_forward(self, x_BPD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
        x_BPD = modulate(plain_norm(x_BPD, self.eps), shift_BD, scale_BD)
        return self.down(keep(ops.gelu(keep(self.up(x_BPD)), approximate=True)))

    def __call__(self, x_BPD: jax.Array, condition_BD: jax.Array, remat: str) -> jax.Array:
        vectors_B6D = self.modulation(jax.nn.silu(condition_BD)).reshape(len(condition_BD), 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (vectors_B6D[:, k] for k in range(6))
        with jax.named_scope("attention"):
            x_BPD = x_BPD + gate1[:, None] * rematerialise_attention(Block.attend, remat)(self, x_BPD, shift1, scale1)
        with jax.named_scope("mlp"):
            return x_BPD + gate2[:, None] * self.feed_forward(x_BPD, shift2, scale2)


class DiT(nnx.Module):
    """Predicts the velocity of each patch from noisy patches, a noise level and a class."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        dtype, D = jnp.dtype(config.param_dtype), config.hidden_size
        self.patch_embed = Linear(config.patch_dim, D, ("patch", "embed"), bias=True, rngs=rngs, dtype=dtype)
        self.condition = ConditionEmbedding(config, rngs=rngs, dtype=dtype)
        self.blocks = Block(config, rngs=rngs, dtype=dtype)
        self.head_modulation = zero_linear(D, 2 * D, ("embed", None), dtype=dtype)
        self.head = zero_linear(D, config.patch_dim, ("embed", "patch"), dtype=dtype)

    @property
    def no_class(self) -> int:
        """Label of images whose class is withheld, for classifier-free guidance."""
        return len(self.config.classes)

    def clean(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """(B, P, C) float32 data of a batch: pixels 0 .. 255 as -1 .. 1."""
        return batch["pixels"].astype(jnp.float32) / 127.5 - 1.0

    def conditions(self, batch: Mapping[str, jax.Array], withheld_B: jax.Array) -> jax.Array:
        """(B,) int32: each image's class, or `no_class` where it is withheld."""
        return jnp.where(withheld_B, self.no_class, batch["labels"])

    def velocity(self, noisy_BPC: jax.Array, times_B: jax.Array, labels_B: jax.Array) -> jax.Array:
        """(B, P, C) float32: direction from data to noise.

        Args:
          noisy_BPC: float32 patches at noise level `times_B` (0 is data, 1 is noise).
          labels_B: int32 classes, `no_class` where it is withheld.
        """
        config = self.config
        with jax.named_scope("patch_embed"):
            table_PD = jnp.asarray(
                position_table(config.image_size // config.patch_size, config.hidden_size), self.compute_dtype
            )
            x_BPD = self.patch_embed(noisy_BPC.astype(self.compute_dtype)) + table_PD
        with jax.named_scope("condition"):
            condition_BD = self.condition(times_B, labels_B, self.compute_dtype)
        with jax.named_scope("blocks"):
            x_BPD = scan_layers(
                lambda x, layer: layer(x, condition_BD, config.remat), x_BPD, self.blocks, remat=config.remat
            )
        with jax.named_scope("head"):
            shift_BD, scale_BD = jnp.split(self.head_modulation(jax.nn.silu(condition_BD)), 2, -1)
            return self.head(modulate(plain_norm(x_BPD, config.layer_norm_eps), shift_BD, scale_BD)).astype(jnp.float32)
