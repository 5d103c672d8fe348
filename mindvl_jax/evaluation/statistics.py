"""How sure a score is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(scores: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores (Efron 1979), reproducible by seed.

    Scores that are all equal have no spread to resample: for 0 / 1 scores the Wilson interval then still says that ten right
    answers out of ten are not a certainty.

    Raises:
      ValueError: no scores.
    """
    values = np.asarray(scores, np.float64)
    if not values.size:
        raise ValueError("an interval needs at least one score")
    if np.all(values == values[0]):
        return wilson_interval(float(values.sum()), values.size, level=level) if values[0] in (0.0, 1.0) else (float(values[0]),) * 2
    means = resampled_means(values, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(first: Sequence[float], second: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of mean(second - first) over the same samples: is the second setting really better?

    Raises:
      ValueError: different numbers of samples.
    """
    if len(first) != len(second):
        raise ValueError(f"paired scores must be of the same samples, found {len(first)} and {len(second)}")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if np.all(difference == difference[0]):
        return (float(difference[0]),) * 2
    low, high = np.quantile(resampled_means(difference, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples,) means of draws with replacement, in slices so that a large set needs little memory."""
    generator = np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(values))
    parts = [
        values[generator.integers(0, len(values), (min(step, resamples - start), len(values)))].mean(1) for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def wilson_interval(successes: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927)."""
    z = _normal_quantile((1 + level) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
