"""The three ways to reduce per-token losses to one number.

Legend: B rows, T tokens, S samples a row.

Each reduction is a quotient of two sums over the micro-batches of a step, so accumulation, packing and the mesh change nothing in
`token` and `sample`. A step without any label gives 0 / 0; the caller treats a zero denominator as "nothing to learn".
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Reduction = Literal["token", "sample", "micro_batch"]


def loss_terms(
    losses_BT: jax.Array, weights_BT: jax.Array, segment_ids_BT: jax.Array, *, samples: int, reduction: Reduction
) -> tuple[jax.Array, jax.Array]:
    """(numerator, denominator) of one micro-batch, float32 scalars; loss of a step = sum of numerators / sum of denominators.

    Args:
      losses_BT: weight * negative log-likelihood of each place, float32.
      weights_BT: the weights that `losses_BT` already carries.
      segment_ids_BT: sample of each place, 0 is padding.
      samples: S, most samples in a row.
      reduction:
        token: sum of losses / sum of weights, over the whole global batch;
        sample: mean over samples of each sample's weighted mean; samples without labels do not count;
        micro_batch: mean over micro-batches (one micro-step's rows) of their weighted means; those without labels do not count.
          MindSpeed-MM's default, without its 0 / 0.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    if reduction == "token":
        return jnp.sum(losses_BT), jnp.sum(weights_BT)
    if reduction == "micro_batch":
        total = jnp.sum(weights_BT)
        return jnp.sum(losses_BT) / _nonzero(total), (total > 0).astype(jnp.float32)
    if reduction == "sample":
        # Compared with scatter-add, the one-hot product is a plain matmul: deterministic, shardable, and S is small.
        member_BTS = (segment_ids_BT[:, :, None] == jnp.arange(1, samples + 1)).astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        weight_BS = jnp.einsum("BT,BTS->BS", weights_BT, member_BTS, precision=exact)
        loss_BS = jnp.einsum("BT,BTS->BS", losses_BT, member_BTS, precision=exact)
        return jnp.sum(loss_BS / _nonzero(weight_BS)), jnp.sum((weight_BS > 0).astype(jnp.float32))
    raise ValueError(f"unknown loss reduction {reduction!r}")


def by_source(losses_BT: jax.Array, weights_BT: jax.Array, source_ids_BT: jax.Array, sources: int) -> jax.Array:
    """(K, 2) float32: sums of losses and of weights over the places of each of K sources."""
    terms_BT2 = jnp.stack([losses_BT, weights_BT.astype(jnp.float32)], axis=-1)
    of_source_BTK = source_ids_BT[:, :, None] == jnp.arange(sources)
    return jnp.sum(jnp.where(of_source_BTK[..., None], terms_BT2[:, :, None], 0.0), axis=(0, 1))


def _nonzero(x: jax.Array) -> jax.Array:
    """x, with 1 where it is 0: such places have nothing above the line either, and their gradient stays 0 instead of NaN."""
    return jnp.where(x > 0, x, 1.0)
