"""Confidence intervals of scores, by scipy.stats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats

RESAMPLES = 2000
BATCH = 4_000_000  # draws held at a time, so that a large set needs little memory


def bootstrap_interval(
    scores: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores (Efron 1979), reproducible by seed.

    Equal scores have no spread to resample. If all are 0 or all are 1, return the Wilson interval instead: ten right
    answers out of ten are not a certainty.

    Raises:
      ValueError: no scores.
    """
    values = np.asarray(scores, np.float64)
    if not values.size:
        raise ValueError("an interval needs at least one score")
    if np.all(values == values[0]) and values[0] in (0.0, 1.0):
        interval = scipy.stats.binomtest(int(values.sum()), values.size).proportion_ci(level, method="wilson")
        return float(interval.low), float(interval.high)
    return _of_mean(values, level, resamples, seed)


def paired_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of mean(second - first) over the same samples.

    Narrower than what two separate intervals suggest, because most samples are as hard for one setting as for the
    other.

    Raises:
      ValueError: different numbers of samples.
    """
    if len(first) != len(second):
        raise ValueError(f"paired scores must be of the same samples, found {len(first)} and {len(second)}")
    return _of_mean(np.asarray(second, np.float64) - np.asarray(first, np.float64), level, resamples, seed)


def _of_mean(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    if np.all(values == values[0]):
        return (float(values[0]),) * 2
    interval = scipy.stats.bootstrap(
        (values,), np.mean, vectorized=True, method="percentile", confidence_level=level, n_resamples=resamples,
        batch=max(1, BATCH // len(values)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)
