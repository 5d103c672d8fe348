"""Counts of a MindVL batch, made on the device for display and FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mindvl_jax.models.counts import Counts
from mindvl_jax.models.vision_language.batch import Batch

SHOWN = ("tokens", "label_tokens", "samples", "patches")


def batch_counts(batch: Batch) -> dict[str, jax.Array]:
    """Tokens, labelled tokens, samples and patches without padding, and sums of squared lengths for each kind of
    attention.

    Float32 scalars: exact up to 2^24, and only for display and FLOPs.
    """

    def squares(lengths):
        return jnp.sum(jnp.square(jnp.maximum(lengths, 0).astype(jnp.float32)))

    def count(mask):
        return jnp.sum(mask.astype(jnp.float32))

    return {
        "tokens": count(batch.segment_ids > 0),
        "label_tokens": count(batch.loss_weights > 0),
        "samples": count(batch.segment_lengths > 0),
        "patches": count(batch.patch_segment_ids > 0),
        "segment_squares": squares(batch.segment_lengths),
        "image_squares": squares(batch.image_lengths),
        "window_squares": squares(batch.window_lengths),
    }


COUNTS = Counts((*SHOWN, "segment_squares", "image_squares", "window_squares"), SHOWN, batch_counts)
