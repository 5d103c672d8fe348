"""Losses of the three targets and their weights, against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from mindvl_jax.config.schema import FlowMatchingConfig
from mindvl_jax.objectives.flow_matching import for_phase

B, SHAPE = 6, (5, 3)
CLEAN = np.random.default_rng(0).normal(size=(B, *SHAPE)).astype(np.float32)
BATCH = {"weights": np.array([1, 1, 0, 1, 0.5, 1], np.float32), "numbers": np.arange(B) + 40}


class Half:
    """Predicts half of the noisy sample."""

    def clean(self, batch):
        return jnp.asarray(CLEAN)

    def conditions(self, batch, withheld_B):
        return withheld_B

    def velocity(self, noisy, times_B, conditions):
        return noisy / 2


def schedule(zero):
    """alpha^2 as its paper writes it: scaled_linear betas, rescaled in the square root for zero terminal SNR."""
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]) if zero else alpha) ** 2


@pytest.mark.parametrize(
    "options",
    [
        dict(target="velocity", weighting="bell", shift=5.0),
        dict(target="epsilon", weighting="min_snr"),
        dict(target="v", weighting="min_snr", zero_terminal_snr=True, snr_gamma=3.0),
        dict(target="v"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_loss_is_the_weighted_error_of_the_target(options):
    objective = for_phase(FlowMatchingConfig(**options), tokens=5)
    key = jax.random.key(3)
    noise, times, _ = (np.asarray(part, np.float64) for part in objective.draw(key, BATCH["numbers"], SHAPE))
    snr = None
    if options["target"] == "velocity":
        alpha, sigma, wanted = 1 - times, times, noise - CLEAN
    else:
        steps = np.round(times * 1000).astype(int)
        np.testing.assert_allclose(times * 1000, steps, atol=1e-4)
        squared = schedule(options.get("zero_terminal_snr", False))[steps]
        alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
        snr = squared / (1 - squared)
        wanted = (
            noise if options["target"] == "epsilon" else alpha[:, None, None] * noise - sigma[:, None, None] * CLEAN
        )
    noisy = alpha[:, None, None] * CLEAN + sigma[:, None, None] * noise
    errors = np.mean((noisy / 2 - wanted) ** 2, axis=(1, 2))
    if options.get("weighting") == "bell":
        grid = np.linspace(1, 0.001, 1000)
        grid = 5 * grid / (1 + 4 * grid)
        curve = np.exp(-2 * (grid - 0.5) ** 2)
        errors *= np.maximum(np.exp(-2 * (times - 0.5) ** 2) - curve.min(), 0) / (curve - curve.min()).mean()
    elif options.get("weighting") == "min_snr":
        capped = np.minimum(snr, options.get("snr_gamma", 5.0))
        errors *= capped / (snr if options["target"] == "epsilon" else snr + 1)
    terms = objective.loss(Half(), BATCH, key)
    np.testing.assert_allclose(terms.numerator, np.sum(BATCH["weights"] * errors), rtol=2e-5)
    np.testing.assert_allclose(terms.denominator, 4.5)


def test_a_samples_draw_depends_on_its_number_alone():
    objective = for_phase(FlowMatchingConfig(target="v"), tokens=5)
    key, order = jax.random.key(0), np.array([3, 0, 5])
    whole = objective.draw(key, BATCH["numbers"], SHAPE)
    part = objective.draw(key, BATCH["numbers"][order], SHAPE)
    for all_of_them, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.asarray(all_of_them)[order], some)


def test_weights_and_schedules_of_another_target_are_refused():
    with pytest.raises(ValidationError, match="min_snr is of target epsilon or v"):
        FlowMatchingConfig(weighting="min_snr")
    with pytest.raises(ValidationError, match="bell is of target velocity"):
        FlowMatchingConfig(target="v", weighting="bell")
    with pytest.raises(ValidationError, match="needs target v"):
        FlowMatchingConfig(target="epsilon", zero_terminal_snr=True)
