"""Transformer of Flux.1 (Black Forest Labs, 2024): joint blocks with a stream of weights for text and one for the
image, then parallel blocks over both.

Legend: B rows (images), S text tokens, P image tokens, T = S + P, C numbers a token, D width, N heads, H head dim.

Text comes first in the joint sequence. All tokens rotate by (index, row, column), text by zeros. No mask: padding of
the text is attended, as in training.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.models.flux.config import FluxConfig
from mindvl_jax.models.layers.joint import Projections, Rotary, Stream, attend, chunks
from mindvl_jax.models.layers.linear import Linear
from mindvl_jax.models.layers.modulated import (
    EPS,
    TIME_FREQUENCIES,
    VectorEmbedding,
    modulate,
    plain_norm,
    rotary_tables,
    sinusoids,
)
from mindvl_jax.models.layers.stack import keep, rematerialise_attention, scan_layers
from npu_bridge import ops

SCALE = 1000.0  # noise levels 0 .. 1 and guidance are embedded as 1000 times themselves


class JointBlock(nnx.Module):
    """Attention over text and image together; every other weight belongs to one of the two."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype):
        sizes = dict(heads=config.num_heads, qk_norm=True, layers=config.joint_layers, rngs=rngs, dtype=dtype)
        self.image = Stream(config.hidden_size, **sizes)
        self.text = Stream(config.hidden_size, **sizes)

    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array, rotary: Rotary, *, text: int, remat: str):
        active = jax.nn.silu(condition_BD)
        words, pixels = x_BTD[:, :text], x_BTD[:, text:]
        of_words, of_pixels = (chunks(stream.modulation(active), 6) for stream in (self.text, self.image))

        def attention(block: JointBlock, words: jax.Array, pixels: jax.Array) -> jax.Array:
            first = block.text.projections(modulate(plain_norm(words, EPS), *of_words[:2]))
            second = block.image.projections(modulate(plain_norm(pixels, EPS), *of_pixels[:2]))
            return attend(*(jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True)), rotary)

        with jax.named_scope("attention"):
            attended = rematerialise_attention(attention, remat)(self, words, pixels)
        with jax.named_scope("mlp"):
            words = self.text.finish(words, attended[:, :text], *of_words[2:])
            pixels = self.image.finish(pixels, attended[:, text:], *of_pixels[2:])
        return jnp.concatenate([words, pixels], 1)


class ParallelBlock(nnx.Module):
    """Attention and feed-forward side by side, behind one output matrix."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype):
        D, F, L = config.hidden_size, config.intermediate_size, config.parallel_layers
        common = dict(bias=True, rngs=rngs, dtype=dtype, layers=L)
        self.modulation = Linear(D, 3 * D, ("embed", None), **common)
        self.projections = Projections(D, heads=config.num_heads, qk_norm=True, layers=L, rngs=rngs, dtype=dtype)
        self.up = Linear(D, F, ("embed", "mlp"), **common)
        self.output = Linear(D + F, D, ("mlp", "embed"), **common)

    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array, rotary: Rotary) -> jax.Array:
        shift, scale, gate = chunks(self.modulation(jax.nn.silu(condition_BD)), 3)
        h_BTD = modulate(plain_norm(x_BTD, EPS), shift, scale)
        with jax.named_scope("attention"):
            attended = attend(*self.projections(h_BTD), rotary)
        with jax.named_scope("mlp"):
            hidden = ops.gelu(keep(self.up(h_BTD)), approximate=True)
            return x_BTD + gate[:, None] * self.output(jnp.concatenate([attended, hidden], -1))


def coordinates(text: int, rows: int, columns: int) -> np.ndarray:
    """(S + rows * columns, 3) int: zeros for the text, then (0, row, column) of each image token."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    image = np.stack([np.zeros_like(row), row, column], -1).reshape(-1, 3)
    return np.concatenate([np.zeros((text, 3), image.dtype), image])


def to_tokens(latents_BCHW: jax.Array) -> jax.Array:
    """(B, C, 2h, 2w) -> (B, h * w, 4C): a token is 2 x 2 neighbours, channel slowest."""
    B, C, height, width = latents_BCHW.shape
    x = latents_BCHW.reshape(B, C, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, -1, C * 4)


def from_tokens(tokens_BPC: jax.Array, rows: int, columns: int) -> jax.Array:
    """The inverse of `to_tokens` for a grid of rows x columns tokens."""
    B, _, channels = tokens_BPC.shape
    x = tokens_BPC.reshape(B, rows, columns, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B, channels // 4, rows * 2, columns * 2)


class Flux(nnx.Module):
    """Predicts the velocity (direction from data to noise) of latent tokens."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.config, self.compute_dtype = config, jnp.dtype(config.compute_dtype)
        dtype, D = jnp.dtype(config.param_dtype), config.hidden_size
        common = dict(bias=True, rngs=rngs, dtype=dtype)
        embedding = dict(rngs=rngs, dtype=dtype)
        self.image_embed = Linear(config.channels, D, ("patch", "embed"), **common)
        self.text_embed = Linear(config.text_dim, D, (None, "embed"), **common)
        self.time = VectorEmbedding(TIME_FREQUENCIES, D, **embedding)
        self.pooled = VectorEmbedding(config.pooled_dim, D, **embedding)
        self.guidance = VectorEmbedding(TIME_FREQUENCIES, D, **embedding) if config.guidance_embedding else None
        self.joint = JointBlock(config, **embedding)
        self.parallel = ParallelBlock(config, **embedding)
        self.head_scale = Linear(D, D, ("embed", None), **common)
        self.head_shift = Linear(D, D, ("embed", None), **common)
        self.head = Linear(D, config.channels, ("embed", "patch"), **common)

    def condition(self, times_B: jax.Array, pooled_BE: jax.Array, guidance_B: jax.Array | None) -> jax.Array:
        """(B, D). Sinusoids in float32: bfloat16 merges neighbouring noise levels."""
        dtype = self.compute_dtype
        vector_BD = self.time(sinusoids(times_B * SCALE, TIME_FREQUENCIES).astype(dtype))
        if self.guidance is not None:
            if guidance_B is None:
                raise ValueError("this model embeds the guidance scale: give guidance_B")
            vector_BD = vector_BD + self.guidance(sinusoids(guidance_B * SCALE, TIME_FREQUENCIES).astype(dtype))
        return vector_BD + self.pooled(pooled_BE.astype(dtype))

    def velocity(
        self,
        noisy_BPC: jax.Array,
        times_B: jax.Array,
        text_BSE: jax.Array,
        pooled_BE: jax.Array,
        *,
        grid: tuple[int, int],
        guidance_B: jax.Array | None = None,
    ) -> jax.Array:
        """(B, P, C) float32.

        Args:
          noisy_BPC: tokens at noise level `times_B` (0 is data, 1 is noise).
          text_BSE: states of the text encoder, padding included. pooled_BE: of the second encoder.
          grid: (rows, columns) of the tokens. guidance_B: of models that embed it.

        Raises:
          ValueError: a grid of another size; a guidance that is missing.
        """
        config, dtype = self.config, self.compute_dtype
        if noisy_BPC.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{noisy_BPC.shape[1]} tokens are no grid of {grid[0]} x {grid[1]}")
        S = text_BSE.shape[1]
        cos, sin = rotary_tables(coordinates(S, *grid), config.rope_axes, config.rope_theta)
        rotary = Rotary(*(jnp.broadcast_to(table, (len(noisy_BPC), *table.shape)) for table in (cos, sin)))
        with jax.named_scope("condition"):
            condition_BD = self.condition(times_B, pooled_BE, guidance_B)
        words, pixels = self.text_embed(text_BSE.astype(dtype)), self.image_embed(noisy_BPC.astype(dtype))
        x_BTD, remat = jnp.concatenate([words, pixels], 1), config.remat
        with jax.named_scope("joint"):
            x_BTD = scan_layers(
                lambda x, layer: layer(x, condition_BD, rotary, text=S, remat=remat), x_BTD, self.joint, remat=remat
            )
        with jax.named_scope("parallel"):
            x_BTD = scan_layers(lambda x, layer: layer(x, condition_BD, rotary), x_BTD, self.parallel, remat=remat)
        with jax.named_scope("head"):
            active = jax.nn.silu(condition_BD)
            x_BPD = modulate(plain_norm(x_BTD[:, S:], EPS), self.head_shift(active), self.head_scale(active))
            return self.head(x_BPD).astype(jnp.float32)
