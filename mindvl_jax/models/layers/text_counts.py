"""Counts of a batch of text alone, made on the device for display and FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mindvl_jax.models.counts import Counts
from mindvl_jax.models.vision_language.batch import Batch

SHOWN = ("tokens", "label_tokens", "samples")


def text_counts(batch: Batch) -> dict[str, jax.Array]:
    """Tokens, labelled tokens and samples without padding, and the sum of squared lengths.

    Float32 scalars: exact up to 2^24, and only for display and FLOPs.
    """

    def count(mask):
        return jnp.sum(mask.astype(jnp.float32))

    return {
        "tokens": count(batch.segment_ids > 0),
        "label_tokens": count(batch.loss_weights > 0),
        "samples": count(batch.segment_lengths > 0),
        "segment_squares": jnp.sum(jnp.square(jnp.maximum(batch.segment_lengths, 0).astype(jnp.float32))),
    }


COUNTS = Counts((*SHOWN, "segment_squares"), SHOWN, text_counts)
