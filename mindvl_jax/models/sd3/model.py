"""Transformer of Stable Diffusion 3 (Esser et al., 2024): joint blocks of text and image.

Legend: B rows (images), S text tokens, P image tokens, C latent channels, D width.

The image comes first in the joint sequence. Its positions are a table, cropped in the centre; nothing rotates. No
mask: padding of the text is attended, as in training. The last block only attends the text and does not change it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.joint import Projections, Stream, attend, chunks
from mindvl_jax.models.layers.linear import Linear, parameter
from mindvl_jax.models.layers.modulated import (
    EPS,
    TIME_FREQUENCIES,
    VectorEmbedding,
    modulate,
    plain_norm,
    sinusoids,
)
from mindvl_jax.models.layers.stack import rematerialise_attention, scan_layers
from mindvl_jax.models.sd3.config import Sd3Config

SCALE = 1000.0  # noise levels 0 .. 1 are embedded as 0 .. 1000
PATCH = 2


class JointBlock(nnx.Module):
    """Attention over image and text together; every other weight belongs to one of the two."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype):
        sizes = dict(heads=config.num_heads, qk_norm=config.qk_norm, layers=config.num_layers - 1)
        self.image = Stream(config.hidden_size, **sizes, rngs=rngs, dtype=dtype)
        self.text = Stream(config.hidden_size, **sizes, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array, *, image: int, remat: str) -> jax.Array:
        active = jax.nn.silu(condition_BD)
        pixels, words = x_BTD[:, :image], x_BTD[:, image:]
        of_pixels, of_words = (chunks(stream.modulation(active), 6) for stream in (self.image, self.text))

        def attention(block: JointBlock, pixels: jax.Array, words: jax.Array) -> jax.Array:
            first = block.image.projections(modulate(plain_norm(pixels, EPS), *of_pixels[:2]))
            second = block.text.projections(modulate(plain_norm(words, EPS), *of_words[:2]))
            return attend(*(jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True)), None)

        with jax.named_scope("attention"):
            attended = rematerialise_attention(attention, remat)(self, pixels, words)
        with jax.named_scope("mlp"):
            pixels = self.image.finish(pixels, attended[:, :image], *of_pixels[2:])
            words = self.text.finish(words, attended[:, image:], *of_words[2:])
        return jnp.concatenate([pixels, words], 1)


class LastBlock(nnx.Module):
    """The last block: text gives keys, values and queries whose results nobody reads."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype):
        D, sizes = config.hidden_size, dict(heads=config.num_heads, qk_norm=config.qk_norm, layers=None)
        common = dict(bias=True, rngs=rngs, dtype=dtype)
        self.image = Stream(D, **sizes, rngs=rngs, dtype=dtype)
        self.text_scale = Linear(D, D, ("embed", None), **common)
        self.text_shift = Linear(D, D, ("embed", None), **common)
        self.text = Projections(D, **sizes, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array, *, image: int) -> jax.Array:
        """(B, P, D): the image alone."""
        active = jax.nn.silu(condition_BD)
        pixels, words = x_BTD[:, :image], x_BTD[:, image:]
        of_pixels = chunks(self.image.modulation(active), 6)
        first = self.image.projections(modulate(plain_norm(pixels, EPS), *of_pixels[:2]))
        second = self.text(modulate(plain_norm(words, EPS), self.text_shift(active), self.text_scale(active)))
        attended = attend(*(jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True)), None)
        return self.image.finish(pixels, attended[:, :image], *of_pixels[2:])


class Sd3(nnx.Module):
    """Predicts the velocity (direction from data to noise) of latents."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs):
        self.config, self.compute_dtype = config, jnp.dtype(config.compute_dtype)
        dtype, D = jnp.dtype(config.param_dtype), config.hidden_size
        common, inputs = dict(bias=True, rngs=rngs, dtype=dtype), config.channels * PATCH**2
        self.image_embed = Linear(inputs, D, ("patch", "embed"), **common)
        self.positions = parameter(jnp.zeros((config.positions_side**2, D), dtype), (None, "embed"))
        self.text_embed = Linear(config.text_dim, D, (None, "embed"), **common)
        self.time = VectorEmbedding(TIME_FREQUENCIES, D, rngs=rngs, dtype=dtype)
        self.pooled = VectorEmbedding(config.pooled_dim, D, rngs=rngs, dtype=dtype)
        self.joint = JointBlock(config, rngs=rngs, dtype=dtype)
        self.last = LastBlock(config, rngs=rngs, dtype=dtype)
        self.head_scale = Linear(D, D, ("embed", None), **common)
        self.head_shift = Linear(D, D, ("embed", None), **common)
        self.head = Linear(D, inputs, ("embed", "patch"), **common)

    def cropped(self, rows: int, columns: int) -> jax.Array:
        """(P, D): the centre of the table of positions.

        Raises:
          ValueError: a picture larger than the table.
        """
        side = self.config.positions_side
        if max(rows, columns) > side:
            raise ValueError(f"{rows} x {columns} tokens, but the table of positions has {side} x {side}")
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.positions[...].reshape(side, side, -1)
        return table[top : top + rows, left : left + columns].reshape(rows * columns, -1)

    def velocity(
        self, noisy_BCHW: jax.Array, times_B: jax.Array, text_BSE: jax.Array, pooled_BE: jax.Array
    ) -> jax.Array:
        """(B, C, H, W) float32.

        Args:
          noisy_BCHW: latents at noise level `times_B` (0 is data, 1 is noise), both sides even.
          text_BSE: states of the text encoders, padding included. pooled_BE: of the CLIP encoders.
        """
        config, dtype = self.config, self.compute_dtype
        B, C, height, width = noisy_BCHW.shape
        rows, columns = height // PATCH, width // PATCH
        P, remat = rows * columns, config.remat
        patches = noisy_BCHW.reshape(B, C, rows, PATCH, columns, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(B, P, -1)
        with jax.named_scope("condition"):
            # Sinusoids in float32: bfloat16 merges neighbouring noise levels.
            condition_BD = self.time(sinusoids(times_B * SCALE, TIME_FREQUENCIES).astype(dtype))
            condition_BD = condition_BD + self.pooled(pooled_BE.astype(dtype))
        pixels = self.image_embed(patches.astype(dtype)) + self.cropped(rows, columns).astype(dtype)
        x_BTD = jnp.concatenate([pixels, self.text_embed(text_BSE.astype(dtype))], 1)
        with jax.named_scope("joint"):
            x_BTD = scan_layers(
                lambda x, layer: layer(x, condition_BD, image=P, remat=remat), x_BTD, self.joint, remat=remat
            )
            x_BPD = self.last(x_BTD, condition_BD, image=P)
        with jax.named_scope("head"):
            active = jax.nn.silu(condition_BD)
            x_BPD = modulate(plain_norm(x_BPD, EPS), self.head_shift(active), self.head_scale(active))
            # Unlike the input, the output has its channel fastest.
            out = self.head(x_BPD).astype(jnp.float32).reshape(B, rows, columns, PATCH, PATCH, C)
        return out.transpose(0, 5, 1, 3, 2, 4).reshape(B, C, height, width)
