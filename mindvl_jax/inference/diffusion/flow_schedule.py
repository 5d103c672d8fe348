"""Noise levels of a pipeline folder's scheduler (`FlowMatchEulerDiscreteScheduler`), in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.objectives.paths import shifted

NAME = "FlowMatchEulerDiscreteScheduler"
# Settings that change the levels and are not built, with the value that leaves them out.
ABSENT: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "num_train_timesteps": 1000,
}


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """How noise levels are spaced.

    Attributes:
      shift: constant shift; unused where it is dynamic.
      dynamic: the shift is e^mu, with mu linear in the tokens of an image, from `tokens` to `mu`.
    """

    shift: float
    dynamic: bool
    tokens: tuple[int, int]
    mu: tuple[float, float]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> FlowSchedule:
        """From scheduler_config.json.

        Raises:
          UserError: another scheduler, or settings that are not built; all of them.
        """
        if content.get("_class_name") != NAME:
            raise UserError(f"scheduler {content.get('_class_name')!r} is not supported; supported: {NAME}")
        wrong = [f"{key} is {content[key]!r}" for key, value in ABSENT.items() if content.get(key, value) != value]
        if wrong:
            raise UserError(f"scheduler: {'; '.join(wrong)}, which is not supported")
        return cls(
            shift=content.get("shift", 1.0),
            dynamic=content.get("use_dynamic_shifting", False),
            tokens=(content.get("base_image_seq_len", 256), content.get("max_image_seq_len", 4096)),
            mu=(content.get("base_shift", 0.5), content.get("max_shift", 1.15)),
        )

    def levels(self, steps: int, tokens: int) -> np.ndarray:
        """(S + 1,) float64: 1, .., 1 / S and 0, shifted once.

        Raises:
          ValueError: fewer than one step.
        """
        return self._shift(self._spaced(steps, 1.0 / max(steps, 1)), tokens)

    def published_levels(self, steps: int, tokens: int) -> np.ndarray:
        """(S + 1,) float64: the scheduler's own spacing, where a pipeline gives it no levels (SD3).

        It ends at the last of 1,000 training levels, which a constant shift has moved already, and shifts again:
        pictures of the published pipelines are made so.

        Raises:
          ValueError: fewer than one step.
        """
        last = 1e-3 if self.dynamic else float(shifted(1e-3, self.shift))
        return self._shift(self._spaced(steps, last), tokens)

    def _spaced(self, steps: int, last: float) -> np.ndarray:
        if steps < 1:
            raise ValueError(f"{steps} steps: expected at least one")
        return np.linspace(1.0, last, steps)

    def _shift(self, levels: np.ndarray, tokens: int) -> np.ndarray:
        shift = self.shift
        if self.dynamic:
            slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
            shift = math.exp(self.mu[0] + slope * (tokens - self.tokens[0]))
        return np.append(shifted(levels, shift), 0.0)
