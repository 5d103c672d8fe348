"""Visual tokens into their places among the token embeddings.

B rows, T tokens, G visual tokens a row, D language width.
"""

from __future__ import annotations

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
