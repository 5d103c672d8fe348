"""Image autoencoder with a Gaussian latent (`AutoencoderKL` of diffusers; Rombach et al., 2022).

Legend: B images, C channels, H and W height and width. Channels come first, as published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.frozen.tensors import Tensors
from npu_bridge import ops

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class KlVae:
    """Sizes of an autoencoder.

    Attributes:
      levels: resolutions; each but the last halves it.
      scaling, shift: a model sees (latent - shift) * scaling.
    """

    levels: int
    blocks: int
    groups: int
    latent_channels: int
    scaling: float
    shift: float
    quantised: tuple[bool, bool]
    middle_attention: bool

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> KlVae:
        """From config.json.

        Raises:
          UserError: another class, or blocks that are not built.
        """
        problems = []
        expected = {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
            "latents_mean": None,
            "latents_std": None,
        }
        for key, value in expected.items():
            if content.get(key, value) != value:
                problems.append(f"{key} is {content[key]!r}, supported is {value!r}")
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if wrong := sorted(set(content.get(key, [block])) - {block}):
                problems.append(f"{key} has {', '.join(wrong)}, supported is {block}")
        if problems:
            raise UserError("autoencoder: " + "; ".join(problems))
        return cls(
            levels=len(content["block_out_channels"]),
            blocks=content.get("layers_per_block", 1),
            groups=content.get("norm_num_groups", 32),
            latent_channels=content.get("latent_channels", 4),
            scaling=content.get("scaling_factor", 0.18215),
            shift=content.get("shift_factor") or 0.0,
            quantised=(content.get("use_quant_conv", True), content.get("use_post_quant_conv", True)),
            middle_attention=content.get("mid_block_add_attention", True),
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (self.levels - 1)


def _convolution(tensors: Tensors, name: str, x: jax.Array, *, stride: int = 1, padding=None) -> jax.Array:
    kernel = tensors(f"{name}.weight")
    around = kernel.shape[-1] // 2
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding or ((around, around), (around, around)),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y + tensors(f"{name}.bias")[:, None, None]


def _group_norm(config: KlVae, tensors: Tensors, name: str, x_BCHW: jax.Array) -> jax.Array:
    """In float32: half precision overflows in the published decoders."""
    grouped = x_BCHW.astype(jnp.float32).reshape(len(x_BCHW), config.groups, -1)
    mean, variance = jnp.mean(grouped, -1, keepdims=True), jnp.var(grouped, -1, keepdims=True)
    normal = ((grouped - mean) / jnp.sqrt(variance + EPS)).reshape(x_BCHW.shape)
    scale, bias = tensors(f"{name}.weight")[:, None, None], tensors(f"{name}.bias")[:, None, None]
    return (normal * scale + bias).astype(x_BCHW.dtype)


def _residual(config: KlVae, tensors: Tensors, x: jax.Array) -> jax.Array:
    h = _convolution(tensors, "conv1", jax.nn.silu(_group_norm(config, tensors, "norm1", x)))
    h = _convolution(tensors, "conv2", jax.nn.silu(_group_norm(config, tensors, "norm2", h)))
    return h + (_convolution(tensors, "conv_shortcut", x) if tensors.has("conv_shortcut.weight") else x)


def _middle(config: KlVae, tensors: Tensors, x_BCHW: jax.Array) -> jax.Array:
    x_BCHW = _residual(config, tensors.at("resnets.0"), x_BCHW)
    if config.middle_attention:
        block, B, C = tensors.at("attentions.0"), *x_BCHW.shape[:2]
        h_BTC = _group_norm(config, block, "group_norm", x_BCHW).reshape(B, C, -1).swapaxes(1, 2)
        q, k, v = (block.linear(f"to_{letter}", h_BTC)[:, :, None] for letter in "qkv")
        out = block.linear("to_out.0", ops.attention(q, k, v, causal=False)[:, :, 0])
        x_BCHW = x_BCHW + out.swapaxes(1, 2).reshape(x_BCHW.shape)
    return _residual(config, tensors.at("resnets.1"), x_BCHW)


def encode(config: KlVae, tensors: Tensors, pixels_BCHW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, log-variance) of the latents, unscaled.

    Args:
      pixels_BCHW: -1 .. 1, sides a multiple of `factor`.
    """
    encoder = tensors.at("encoder")
    x = _convolution(encoder, "conv_in", pixels_BCHW)
    for level in range(config.levels):
        block = encoder.at(f"down_blocks.{level}")
        for number in range(config.blocks):
            x = _residual(config, block.at(f"resnets.{number}"), x)
        if level < config.levels - 1:  # padded at the bottom and the right alone
            x = _convolution(block, "downsamplers.0.conv", x, stride=2, padding=((0, 1), (0, 1)))
    x = _middle(config, encoder.at("mid_block"), x)
    x = _convolution(encoder, "conv_out", jax.nn.silu(_group_norm(config, encoder, "conv_norm_out", x)))
    if config.quantised[0]:
        x = _convolution(tensors, "quant_conv", x)
    mean, log_variance = jnp.split(x, 2, 1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def decode(config: KlVae, tensors: Tensors, latents_BCHW: jax.Array) -> jax.Array:
    """Pixels, about -1 .. 1, of unscaled latents."""
    decoder, x = tensors.at("decoder"), latents_BCHW
    if config.quantised[1]:
        x = _convolution(tensors, "post_quant_conv", x)
    x = _middle(config, decoder.at("mid_block"), _convolution(decoder, "conv_in", x))
    for level in range(config.levels):
        block = decoder.at(f"up_blocks.{level}")
        for number in range(config.blocks + 1):
            x = _residual(config, block.at(f"resnets.{number}"), x)
        if level < config.levels - 1:
            x = _convolution(block, "upsamplers.0.conv", jnp.repeat(jnp.repeat(x, 2, 2), 2, 3))
    return _convolution(decoder, "conv_out", jax.nn.silu(_group_norm(config, decoder, "conv_norm_out", x)))
