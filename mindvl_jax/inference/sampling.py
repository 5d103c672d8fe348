"""Choose the next token on the device.

Legend: B rows (slots), V vocabulary. Every row has its own settings and random key, so its choice depends neither on
other rows nor on its slot: a request returns the same text alone, in any batch, and whenever it is admitted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # not -inf: a difference of two infinities is NaN


def apply_repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Make tokens that occurred in prompt or answer less likely; 1 changes nothing.

    A positive logit is divided by the penalty and a negative one multiplied (CTRL, Keskar et al. 2019, section 4.1, in
    the form that transformers' RepetitionPenaltyLogitsProcessor uses).
    """
    penalty_B1 = penalty_B[:, None]
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, punished_BV, logits_BV)


def apply_count_penalties(
    logits_BV: jax.Array, counts_BV: jax.Array, presence_B: jax.Array, frequency_B: jax.Array
) -> jax.Array:
    """Penalise tokens of the answer so far: `presence` once, `frequency` per occurrence (OpenAI's definition)."""
    counts_BV = counts_BV.astype(jnp.float32)
    return logits_BV - presence_B[:, None] * (counts_BV > 0) - frequency_B[:, None] * counts_BV


def allow(logits_BV: jax.Array, allowed_BV: jax.Array | None) -> jax.Array:
    """Exclude the tokens that a grammar does not allow; None allows all."""
    return logits_BV if allowed_BV is None else jnp.where(allowed_BV, logits_BV, NEGATIVE)


def restrict(
    logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array | None = None
) -> jax.Array:
    """Keep the `top_k` most likely tokens (0: no limit), of these the nucleus of mass `top_p` (1: no limit), of these
    the ones at least `min_p` times as likely as the likeliest (0: no limit).

    As in transformers, the nucleus is measured inside what top-k left, the token that crosses `top_p` stays in, and
    tokens that tie with the k-th stay.
    """
    V = logits_BV.shape[-1]
    k_B = jnp.where(top_k_B <= 0, V, jnp.minimum(top_k_B, V))
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    kth_B1 = jnp.take_along_axis(descending_BV, (k_B - 1)[:, None], axis=-1)
    sorted_kept_BV = jnp.where(descending_BV >= kth_B1, descending_BV, NEGATIVE)
    sorted_probs_BV = jax.nn.softmax(sorted_kept_BV, axis=-1)
    mass_before_BV = jnp.cumsum(sorted_probs_BV, axis=-1) - sorted_probs_BV
    in_nucleus_BV = (mass_before_BV < top_p_B[:, None]).at[:, 0].set(True)
    lowest_B1 = jnp.min(
        jnp.where(in_nucleus_BV & (sorted_kept_BV > NEGATIVE), sorted_kept_BV, jnp.inf), axis=-1, keepdims=True
    )
    if min_p_B is not None:  # a ratio of probabilities is a difference of logits
        relative_B1 = jnp.log(jnp.maximum(min_p_B, 1e-30))[:, None] + descending_BV[:, :1]
        lowest_B1 = jnp.where(min_p_B[:, None] > 0, jnp.maximum(lowest_B1, relative_B1), lowest_B1)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, NEGATIVE)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Argmax over the last axis, int32 without that axis; the first of equals.

    Computed as a maximum and the smallest index that has it: on a CPU, XLA vectorises both but not its argmax (176 us
    for 16 rows of 2,300 tokens; the maximum takes 3).
    """
    V = logits_BV.shape[-1]
    highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    index_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
    # The last token if all logits are NaN, so that no index is out of range.
    return jnp.min(jnp.where(logits_BV == highest_B1, index_BV, V - 1), axis=-1)


def choose(
    logits_BV: jax.Array,
    *,
    keys_B2: jax.Array,
    counts_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array | None = None,
) -> jax.Array:
    """Next token of each row, (B,) int32: the most likely one where temperature is 0, a sample elsewhere.

    Args:
      logits_BV: float32 scores, penalties already applied.
      keys_B2: uint32 key of each request; the draw for its n-th token uses the key folded with n.
      counts_B: tokens that each request has generated so far.
    """
    greedy_B = likeliest(logits_BV)

    def draw(_):
        scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
        allowed_BV = restrict(scaled_BV, top_k_B, top_p_B, min_p_B)
        folded_B2 = jax.vmap(jax.random.fold_in)(keys_B2, counts_B)
        drawn_B = jax.vmap(jax.random.categorical)(folded_B2, allowed_BV).astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    # Sorting the vocabulary costs more than a whole step of a small model: only do it if some row samples.
    return jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda _: greedy_B, None)


def log_probability(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Log-probability (B,) float32 of the chosen tokens under the model itself: temperature 1, no penalty, no cut."""
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return picked_B - jax.nn.logsumexp(logits_BV, axis=-1)
