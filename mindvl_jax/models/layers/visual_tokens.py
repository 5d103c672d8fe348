"""Visual tokens into their places among the token embeddings.

B rows, T tokens, G visual tokens a row, D language width, K layers that visual features are added after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def place_visual(tokens_BTD: jax.Array, visual_BGD: jax.Array, index_BT: jax.Array) -> jax.Array:
    """`visual[index]` where index is not negative, else `tokens`.

    Args:
      index_BT: (B, T) int32, which visual token feeds each place, -1 for text. No visual token feeds two places of a
        row.

    Returns:
      (B, T, D) in the dtype of `tokens`.
    """
    chosen = _rows(visual_BGD, jnp.maximum(index_BT, 0)).astype(tokens_BTD.dtype)
    return jnp.where(index_BT[..., None] >= 0, chosen, tokens_BTD)


def _rows(values_BGD, index_BT):
    return jnp.take_along_axis(values_BGD, index_BT[..., None], 1, mode="clip")


def _forward(tokens_BTD, visual_BGD, index_BT):
    return place_visual(tokens_BTD, visual_BGD, index_BT), (
        index_BT,
        jnp.zeros((visual_BGD.shape[1], 0), visual_BGD.dtype),
    )


def _backward(residuals, g_BTD):
    # The transpose of a gather is a scatter-add of whole rows, slow everywhere. Each visual token has at most one
    # place, so a scatter of integers finds that place and the gradient is a gather again.
    index_BT, like_visual = residuals
    T, groups = index_BT.shape[1], like_visual.shape[0]

    # Row by row under vmap: XLA sees that rows are independent, and does not gather the indexes of rows on other
    # devices.
    def tokens_of(index_T):
        return (
            jnp.full(groups + 1, -1, jnp.int32)
            .at[jnp.where(index_T >= 0, index_T, groups)]
            .set(jnp.arange(T, dtype=jnp.int32))[:groups]
        )

    place_BG = jax.vmap(tokens_of)(index_BT)
    visual = jnp.where(place_BG[..., None] >= 0, _rows(g_BTD, jnp.maximum(place_BG, 0)), 0).astype(like_visual.dtype)
    return jnp.where(index_BT[..., None] >= 0, 0, g_BTD), visual, np.zeros(index_BT.shape, jax.dtypes.float0)


place_visual.defvjp(_forward, _backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerAdditions:
    """Visual features that a decoder adds to its hidden states after its first layers (DeepStack).

    Attributes:
      features_KBGD: of each of the first K layers.
      index_BT: int32, which visual token each place shows, -1 for text.
    """

    features_KBGD: jax.Array
    index_BT: jax.Array

    def after(self, layer, x_BTD: jax.Array) -> jax.Array:
        """`x_BTD` after layer number `layer` (traced), whose places of text stay as they are, all of them from layer K
        on.
        """
        last = self.features_KBGD.shape[0] - 1
        features_BGD = jax.lax.dynamic_index_in_dim(self.features_KBGD, jnp.minimum(layer, last), 0, keepdims=False)
        index_BT = jnp.where(layer <= last, self.index_BT, -1)
        return x_BTD + place_visual(jnp.zeros_like(x_BTD), features_BGD, index_BT)


def adding(body: Callable, layers: Any, added: LayerAdditions | None) -> tuple[Callable, Any]:
    """Body and stack for a scan over a decoder's layers which also adds `added` after the first of them.

    One stack and one body for all layers: cut off, the first layers would be copied at every step.

    Args:
      body: (x, layer) -> x, or (x, what the scan collects).
    """
    if added is None:
        return body, layers

    def step(x, layer_and_number):
        layer, number = layer_and_number
        out = body(x, layer)
        return (added.after(number, out[0]), out[1]) if isinstance(out, tuple) else added.after(number, out)

    return step, (layers, jnp.arange(jax.tree.leaves(layers)[0].shape[0]))
