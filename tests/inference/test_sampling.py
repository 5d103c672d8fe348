import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from mindvl_jax.inference import sampling

B, V = 6, 37
restrict, choose = (
    jax.jit(sampling.restrict),
    jax.jit(sampling.choose),
)  # one compilation each instead of one an operation


def _logits(seed=0):
    return np.random.default_rng(seed).normal(0, 3, (B, V)).astype(np.float32)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_equals_the_published_processor(penalty):
    logits, history = _logits(), np.random.default_rng(1).integers(0, V, (B, 9))
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = sampling.apply_repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), jnp.full((B,), penalty))
    theirs = reference.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.from_numpy(history), torch.from_numpy(logits.copy())
    )
    difference = np.abs(np.asarray(ours) - theirs.numpy()).max()
    assert difference < 1e-6, f"max difference {difference}"  # one float32 product or quotient


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.5), (1, 1.0), (0, 0.01), (V + 5, 0.9)])
def test_top_k_then_top_p_keep_the_tokens_that_transformers_keeps(top_k, top_p):
    logits = _logits()
    ours = (
        np.asarray(restrict(jnp.asarray(logits), jnp.full((B,), top_k), jnp.full((B,), top_p))) > sampling.NEGATIVE / 2
    )
    theirs = torch.from_numpy(logits.copy())
    if top_k:
        theirs = reference.TopKLogitsWarper(min(top_k, V))(None, theirs)
    if top_p < 1:
        theirs = reference.TopPLogitsWarper(top_p)(None, theirs)
    assert (ours == np.isfinite(theirs.numpy())).all(), (
        f"{ours.sum(1)} kept, transformers keeps {np.isfinite(theirs.numpy()).sum(1)}"
    )


def test_rows_with_different_settings_do_not_disturb_each_other():
    logits = jnp.asarray(_logits())
    mixed = restrict(logits, jnp.array([0, 3, 0, 9, 1, 0]), jnp.array([1.0, 1.0, 0.4, 0.7, 1.0, 0.9]))
    for row, (k, p) in enumerate([(0, 1.0), (3, 1.0), (0, 0.4), (9, 0.7), (1, 1.0), (0, 0.9)]):
        alone = restrict(logits, jnp.full((B,), k), jnp.full((B,), p))[row]
        assert (mixed[row] == alone).all()


def test_samples_follow_the_softmax_of_the_scaled_logits():
    draws, temperature = 20_000, 1.7
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    chosen = choose(
        jnp.broadcast_to(logits, (draws, 4)),
        keys_B2=jax.vmap(jax.random.PRNGKey)(jnp.arange(draws)).astype(jnp.uint32),
        counts_B=jnp.zeros(draws, jnp.int32),
        temperature_B=jnp.full(draws, temperature),
        top_k_B=jnp.zeros(draws, jnp.int32),
        top_p_B=jnp.ones(draws),
    )
    wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(np.asarray(chosen), minlength=4) / draws
    # Five standard deviations of a proportion over 20,000 draws are 0.018.
    assert np.abs(found - wanted).max() < 0.018, f"{found} instead of {wanted}"


def test_temperature_zero_is_greedy_beside_rows_that_sample():
    logits = jnp.asarray(_logits())
    chosen = choose(
        logits,
        keys_B2=jnp.arange(2 * B, dtype=jnp.uint32).reshape(B, 2),
        counts_B=jnp.zeros(B, jnp.int32),
        temperature_B=jnp.array([0, 5.0, 0, 5.0, 0, 5.0]),
        top_k_B=jnp.zeros(B, jnp.int32),
        top_p_B=jnp.ones(B),
    )
    assert (chosen[::2] == logits.argmax(-1)[::2]).all()


def test_log_probability_is_that_of_the_plain_softmax():
    logits = _logits()
    token = logits.argmin(-1)
    ours = np.asarray(sampling.log_probability(jnp.asarray(logits), jnp.asarray(token)))
    theirs = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[np.arange(B), token]
    difference = np.abs(ours - theirs).max()
    assert difference < 1e-5, f"max difference {difference}"  # float32 sum of 37 exponentials
