import math

import numpy as np
import pytest

from mindvl_jax.evaluation import statistics


def test_bootstrap_interval_of_many_scores_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(0).random(300)
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    expected = scores.mean() + np.array([-half, half])
    # The bounds of 2,000 resamples err by about 0.03 standard errors of 0.0167.
    found = statistics.bootstrap_interval(scores)
    assert np.abs(np.array(found) - expected).max() < 0.002, f"{found} and {expected}"
    assert statistics.bootstrap_interval(scores) == found != statistics.bootstrap_interval(scores, seed=1)


def test_interval_of_a_proportion_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = statistics.bootstrap_interval((generator.random(120) < 0.4).astype(float), resamples=500, seed=seed)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.985, hits / 300  # 300 draws of a 95 % event: three standard deviations are 0.038


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_equal_scores_get_wilsons_interval(score):
    n, z = 10, 1.959963984540054
    centre, half = (score + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(z * z / (4 * n * n))
    assert statistics.bootstrap_interval([score] * n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_a_paired_interval_sees_a_gain_that_two_separate_ones_cannot():
    base = np.random.default_rng(1).random(400)
    better = base + 0.02
    assert statistics.paired_interval(base, better)[0] == pytest.approx(0.02)
    low, high = statistics.paired_interval(base, better + np.random.default_rng(2).normal(0, 0.05, 400))
    assert 0 < low < 0.02 < high + 0.01


def test_paired_scores_of_different_samples_are_refused():
    with pytest.raises(ValueError, match="found 3 and 2"):
        statistics.paired_interval([1, 2, 3], [1, 2])
