"""Encoders of T5 v1.1 and UMT5 (Raffel et al., 2020; Chung et al., 2023).

Legend: B rows, T tokens, D width, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.frozen.tensors import Tensors
from npu_bridge import ops

ACTIVATIONS = {"gelu_new": functools.partial(ops.gelu, approximate=True), "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class T5Encoder:
    """Sizes of an encoder.

    Attributes:
      own_bias: every layer has a table of relative positions (UMT5); else the first layer's serves all.
    """

    layers: int
    heads: int
    head_dim: int
    buckets: int
    distance: int
    gated: bool
    activation: str
    eps: float
    own_bias: bool

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> T5Encoder:
        """From config.json.

        Raises:
          UserError: another kind of model, or an activation that is not built.
        """
        kind, feed = content.get("model_type"), content.get("feed_forward_proj", "relu")
        gated, _, activation = feed.rpartition("-")
        activation = "gelu_new" if feed == "gated-gelu" else activation
        if kind not in ("t5", "umt5", "mt5"):
            raise UserError(f"text encoder: model_type is {kind!r}; supported: t5, mt5, umt5")
        if activation not in ACTIVATIONS or gated not in ("", "gated"):
            raise UserError(f"{kind} encoder: feed_forward_proj is {feed!r}; supported: gated-gelu, relu")
        return cls(
            layers=content["num_layers"],
            heads=content["num_heads"],
            head_dim=content["d_kv"],
            buckets=content.get("relative_attention_num_buckets", 32),
            distance=content.get("relative_attention_max_distance", 128),
            gated=bool(gated),
            activation=activation,
            eps=content.get("layer_norm_epsilon", 1e-6),
            own_bias=kind == "umt5",
        )


def position_buckets(config: T5Encoder, length: int) -> np.ndarray:
    """(T, T) int: bucket of each distance from a query to a key; half of them exact, half logarithmic, by sign."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = config.buckets // 2, config.buckets // 4
    size = np.abs(distance)
    # In float32 as the reference: at the edge of a bucket the rounding decides.
    with np.errstate(divide="ignore"):
        scaled = np.log(size.astype(np.float32) / exact) / np.float32(math.log(config.distance / exact))
    large = np.minimum(exact + np.where(size > 0, scaled * (half - exact), 0).astype(int), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, large)


def _norm(tensors: Tensors, name: str, x: jax.Array, eps: float) -> jax.Array:
    return ops.rms_norm(x, tensors(f"{name}.weight"), eps=eps)


def _attention(config: T5Encoder, tensors: Tensors, x_BTD: jax.Array, bias_NTT, mask_BT) -> jax.Array:
    """Softmax over unscaled products plus the bias, in float32."""

    def heads(name: str) -> jax.Array:
        return tensors.linear(name, x_BTD).reshape(*x_BTD.shape[:2], config.heads, config.head_dim)

    scores = jnp.einsum("BTNH,BSNH->BNTS", heads("q"), heads("k"), preferred_element_type=jnp.float32) + bias_NTT
    if mask_BT is not None:
        scores = jnp.where(mask_BT[:, None, None], scores, jnp.finfo(jnp.float32).min)
    share = jax.nn.softmax(scores, -1).astype(x_BTD.dtype)
    out = jnp.einsum("BNTS,BSNH->BTNH", share, heads("v"), preferred_element_type=jnp.float32).astype(x_BTD.dtype)
    return tensors.linear("o", out.reshape(*out.shape[:2], -1))


def _feed_forward(config: T5Encoder, tensors: Tensors, x_BTD: jax.Array) -> jax.Array:
    activation = ACTIVATIONS[config.activation]
    if not config.gated:
        return tensors.linear("wo", activation(tensors.linear("wi", x_BTD)))
    return tensors.linear("wo", activation(tensors.linear("wi_0", x_BTD)) * tensors.linear("wi_1", x_BTD))


def encode(config: T5Encoder, tensors: Tensors, ids_BT: jax.Array, mask_BT: jax.Array | None = None) -> jax.Array:
    """(B, T, D) last states.

    Args:
      mask_BT: True at tokens that are attended; None attends padding too, as SD3 and Flux were trained.
    """
    x_BTD = tensors("shared.weight")[ids_BT]
    for copy in ("encoder.embed_tokens.weight",):
        if tensors.has(copy):  # the same table again
            tensors(copy)
    buckets_TT = position_buckets(config, ids_BT.shape[1])
    bias_NTT = None
    for number in range(config.layers):
        block = tensors.at(f"encoder.block.{number}.layer")
        if bias_NTT is None or config.own_bias:
            table = block("0.SelfAttention.relative_attention_bias.weight").astype(jnp.float32)
            bias_NTT = table[buckets_TT].transpose(2, 0, 1)
        h_BTD = _norm(block, "0.layer_norm", x_BTD, config.eps)
        x_BTD = x_BTD + _attention(config, block.at("0.SelfAttention"), h_BTD, bias_NTT, mask_BT)
        h_BTD = _norm(block, "1.layer_norm", x_BTD, config.eps)
        x_BTD = x_BTD + _feed_forward(config, block.at("1.DenseReluDense"), h_BTD)
    return _norm(tensors, "encoder.final_layer_norm", x_BTD, config.eps)
