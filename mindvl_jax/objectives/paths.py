"""Paths from data to noise: how much of each a noisy sample holds, what the model predicts, what an error weighs.

A sample at time t in [0, 1] is x_t = alpha(t) x_0 + sigma(t) e with e ~ N(0, 1): t = 0 is data, t = 1 is noise.

| target | path | predicted |
|---|---|---|
| velocity | straight: alpha = 1 - t, sigma = t | e - x_0 |
| epsilon | variance-preserving, of 1,000 published betas | e |
| v | the same | alpha e - sigma x_0 |

Tables are float64 numpy: rounded once, where a float32 program reads them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

STEPS = 1000
"""Steps of the published noise schedules; a model sees t * 1000."""

Target = Literal["velocity", "epsilon", "v"]
Betas = Literal["linear", "scaled_linear"]
Weighting = Literal["none", "min_snr", "bell"]

BETAS: dict[str, tuple[float, float]] = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta: of DDPM (Ho et al., 2020), and of latent diffusion, linear in the square root."""


def shifted(times, shift: float):
    """shift * t / (1 + (shift - 1) * t): above 1 noisier times are preferred."""
    return shift * times / (1 + (shift - 1) * times)


@dataclasses.dataclass(frozen=True)
class Path:
    """One path; equal paths make equal programs.

    Attributes:
      target: of the prediction, see the module.
      betas: schedule of `epsilon` and `v`; unused by `velocity`.
      zero_terminal_snr: rescale the betas so that the last step is noise alone (Lin et al., 2023).

    Raises:
      ValueError: epsilon with zero terminal SNR: noise alone tells nothing of the data.
    """

    target: Target = "velocity"
    betas: Betas = "scaled_linear"
    zero_terminal_snr: bool = False

    def __post_init__(self):
        if self.zero_terminal_snr and self.target != "v":
            raise ValueError(
                f"zero_terminal_snr with target {self.target}: only v predicts anything at a step that is noise alone"
            )

    @property
    def straight(self) -> bool:
        return self.target == "velocity"

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma), both (1000,) float64, of the steps 0 .. 999 of a variance-preserving path."""
        first, last = BETAS[self.betas]
        if self.betas == "linear":
            betas = np.linspace(first, last, STEPS)
        else:
            betas = np.linspace(first**0.5, last**0.5, STEPS) ** 2
        alpha = np.sqrt(np.cumprod(1 - betas))
        if self.zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return alpha, np.sqrt(1 - alpha**2)

    def at(self, times) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) float64 at times in [0, 1]; of a variance-preserving path at step 1000 t, rounded down."""
        times = np.asarray(times, np.float64)
        if self.straight:
            return 1 - times, times
        index = np.clip(np.floor(times * STEPS + 1e-6).astype(int), 0, STEPS - 1)
        alpha, sigma = self.table()
        return alpha[index], sigma[index]

    def clean_from(self, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(k, m) such that the predicted data are k * x_t + m * prediction."""
        if self.target == "velocity":
            return np.ones_like(alpha), -sigma
        if self.target == "epsilon":
            return 1 / alpha, -sigma / alpha
        return alpha, -sigma


STRAIGHT = Path()
"""The path of flow matching."""


def bell(shift: float) -> tuple[float, float]:
    """(least, mean) of exp(-2 (t - 1/2)^2) over 1,000 shifted times: the bell weight is (value - least) / (mean -
    least), with mean 1 over that grid (MindSpeed-MM's weight for Wan).
    """
    times = shifted(np.linspace(1, 0, STEPS + 1)[:-1], shift)
    values = np.exp(-2 * (times - 0.5) ** 2)
    return float(values.min()), float(values.mean())
