"""Text encoder of CLIP (Radford et al., 2021).

Legend: B rows, T tokens, D width, N heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.frozen.tensors import Tensors
from mindvl_jax.models.layers.linear import quick_gelu
from npu_bridge import ops

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(ops.gelu, approximate=False)}

# The value that older configurations carry for the end token, whatever it was; the end is then the largest id.
UNKNOWN_END = 2


@dataclasses.dataclass(frozen=True)
class ClipText:
    """Sizes of a text encoder."""

    layers: int
    heads: int
    activation: str
    eps: float
    end_id: int

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> ClipText:
        """From config.json.

        Raises:
          UserError: an activation that is not built.
        """
        activation = content.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS:
            raise UserError(f"CLIP text encoder: hidden_act is {activation!r}; supported: {', '.join(ACTIVATIONS)}")
        return cls(
            layers=content["num_hidden_layers"],
            heads=content["num_attention_heads"],
            activation=activation,
            eps=content.get("layer_norm_eps", 1e-5),
            end_id=content.get("eos_token_id", 49407),
        )


class ClipStates(NamedTuple):
    """last (B, T, D): after the final norm; penultimate (B, T, D): input of the last layer, without a norm;
    pooled (B, D): `last` at the end token; projected, where the encoder has a projection.
    """

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array


def _layer(config: ClipText, tensors: Tensors, x_BTD: jax.Array) -> jax.Array:
    h_BTD = tensors.layer_norm("layer_norm1", x_BTD, config.eps)

    def heads(name: str) -> jax.Array:
        return tensors.linear(f"self_attn.{name}", h_BTD).reshape(*x_BTD.shape[:2], config.heads, -1)

    out = ops.attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), causal=True)
    x_BTD = x_BTD + tensors.linear("self_attn.out_proj", out.reshape(x_BTD.shape))
    h_BTD = tensors.linear("mlp.fc1", tensors.layer_norm("layer_norm2", x_BTD, config.eps))
    return x_BTD + tensors.linear("mlp.fc2", ACTIVATIONS[config.activation](h_BTD))


def encode(config: ClipText, tensors: Tensors, ids_BT: jax.Array) -> ClipStates:
    """States of texts that end with the end token. Causal, so padding behind it changes nothing before it."""
    # transformers writes the same names with and without the prefix, by version.
    inner = tensors.at("text_model") if tensors.has("text_model.final_layer_norm.weight") else tensors
    x_BTD = inner("embeddings.token_embedding.weight")[ids_BT]
    x_BTD = x_BTD + inner("embeddings.position_embedding.weight")[: ids_BT.shape[1]]
    penultimate = x_BTD
    for number in range(config.layers):
        penultimate = x_BTD
        x_BTD = _layer(config, inner.at(f"encoder.layers.{number}"), x_BTD)
    last = inner.layer_norm("final_layer_norm", x_BTD, config.eps)
    end_BT = ids_BT if config.end_id == UNKNOWN_END else (ids_BT == config.end_id).astype(jnp.int32)
    pooled = jnp.take_along_axis(last, jnp.argmax(end_BT, -1)[:, None, None], 1)[:, 0]
    if tensors.has("text_projection.weight"):
        pooled = tensors.linear("text_projection", pooled)
    return ClipStates(last, penultimate, pooled)
