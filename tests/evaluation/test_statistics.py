import numpy as np
import pytest
import scipy.stats

from mindvl_jax.evaluation import statistics


def test_bootstrap_interval_agrees_with_scipy():
    scores = np.random.default_rng(0).random(300)
    ours = statistics.bootstrap_interval(scores)
    theirs = scipy.stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=4000, random_state=1).confidence_interval
    # Two independent sets of resamples: the bounds' own error is about 0.02 standard errors of 0.0167.
    assert np.abs(np.array(ours) - theirs).max() < 0.002, f"{ours} and {theirs}"


def test_interval_of_a_proportion_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = statistics.bootstrap_interval((generator.random(120) < 0.4).astype(float), resamples=500, seed=seed)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.985, hits / 300  # 300 draws of a 95 % event: three standard deviations are 0.038


def test_all_right_is_no_certainty():
    low, high = statistics.bootstrap_interval([1.0] * 10)
    theirs = scipy.stats.binomtest(10, 10).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_paired_interval_sees_a_gain_that_two_separate_ones_cannot():
    base = np.random.default_rng(1).random(400)
    better = base + 0.02
    assert statistics.paired_interval(base, better)[0] == pytest.approx(0.02)
    low, high = statistics.paired_interval(base, better + np.random.default_rng(2).normal(0, 0.05, 400))
    assert 0 < low < 0.02 < high + 0.01


def test_paired_scores_of_different_samples_are_refused():
    with pytest.raises(ValueError, match="found 3 and 2"):
        statistics.paired_interval([1, 2, 3], [1, 2])
