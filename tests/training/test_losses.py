"""The three reductions against sums written out by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.objectives.sft import by_source, loss_terms

REDUCTIONS = ("token", "sample", "micro_batch")


@pytest.fixture(scope="module")
def batch():
    """Two micro-batches of (nll, weights, segments): one sample without labels, one row without any, padding at the
    ends.
    """
    rng = np.random.default_rng(0)
    segments = np.array(
        [[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0]],
        np.int32,
    )
    weights = np.where(segments > 0, rng.integers(0, 3, segments.shape) / 2, 0).astype(np.float32)
    weights[0, 3:5] = 0  # sample 2 of row 0 has no label
    weights[3] = 0
    nll = rng.exponential(2.0, segments.shape).astype(np.float32)
    return nll, weights, segments


def by_hand(nll, weights, segments, reduction, micro_rows):
    nll, weights = nll.astype(np.float64), weights.astype(np.float64)
    if reduction == "token":
        return (nll * weights).sum() / weights.sum()
    if reduction == "micro_batch":
        means = []
        for start in range(0, len(nll), micro_rows):
            w = weights[start : start + micro_rows]
            if w.sum() > 0:
                means.append((nll[start : start + micro_rows] * w).sum() / w.sum())
        return np.mean(means)
    means = []
    for row in range(len(nll)):
        for sample in range(1, segments[row].max() + 1):
            own = segments[row] == sample
            if weights[row][own].sum() > 0:
                means.append((nll[row] * weights[row])[own].sum() / weights[row][own].sum())
    return np.mean(means)


def reduced(nll, weights, segments, reduction, micro_rows):
    numerator = denominator = 0.0
    for start in range(0, len(nll), micro_rows):
        rows = slice(start, start + micro_rows)
        terms = loss_terms(nll[rows] * weights[rows], weights[rows], segments[rows], samples=4, reduction=reduction)
        numerator, denominator = numerator + terms[0], denominator + terms[1]
    return float(numerator / denominator)


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_reduction_is_its_formula_however_the_rows_are_split(batch, reduction, micro_rows):
    got, want = reduced(*batch, reduction, micro_rows), by_hand(*batch, reduction, micro_rows)
    # 32 float32 summands of order 1: a few ulp.
    assert abs(got - want) < 1e-6 * abs(want), f"{reduction}: {got} against {want}, difference {abs(got - want):.2e}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_micro_batch_without_labels_adds_nothing_and_has_no_gradient(batch, reduction):
    nll, weights, segments = (x[3:] for x in batch)  # the row without labels

    def numerator(nll):
        return loss_terms(nll * weights, jnp.asarray(weights), jnp.asarray(segments), samples=4, reduction=reduction)[0]

    _, denominator = loss_terms(nll * weights, weights, segments, samples=4, reduction=reduction)
    value, gradient = jax.value_and_grad(numerator)(jnp.asarray(nll))
    assert float(value) == 0.0 and float(denominator) == 0.0
    assert np.array_equal(np.asarray(gradient), np.zeros_like(nll)), f"largest gradient {np.abs(gradient).max()}"


def test_losses_by_source_are_the_sums_of_that_source_alone(batch):
    nll, weights, segments = batch
    sources = np.where(segments > 0, (segments + np.arange(4)[:, None]) % 3, -1)  # samples of a row differ, rows differ
    got = np.asarray(by_source(nll * weights, weights, sources, 4))
    terms = (nll.astype(np.float64) * weights, weights.astype(np.float64))
    expected = [[term[sources == number].sum() for term in terms] for number in range(4)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (got[3] == 0).all() and (got[:3, 1] > 0).all()


def test_an_unknown_reduction_is_refused(batch):
    with pytest.raises(ValueError, match="unknown loss reduction 'median'"):
        loss_terms(*batch, samples=4, reduction="median")
