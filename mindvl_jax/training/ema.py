"""An exponential moving average of the parameters, kept beside a run (`training.ema_decay`).

After each optimizer step that was applied: average = decay * average + (1 - decay) * parameters, in float32, starting from the
parameters that the run starts with. Skipped steps leave it alone. All parameters are in it, those that a phase freezes too: they
may have learned in the phase before. It lies where the parameters lie and goes into every checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params


@functools.partial(jax.jit, donate_argnames="average")
def _blend(average: Params, params: Params, applied: jax.Array, decay: jax.Array) -> Params:
    keep = jnp.where(applied, decay, jnp.float32(1))
    return {path: keep * average[path] + (1 - keep) * params[path].astype(jnp.float32) for path in average}


class MovingAverage:
    """Args: params: where it starts, by path; copied. decay: share of the old average that a step keeps."""

    def __init__(self, params: Mapping[str, jax.Array], decay: float):
        # A copy: training donates the buffers of its parameters.
        self.params: Params = {path: jnp.array(value, jnp.float32, copy=True) for path, value in params.items()}
        self._decay = jnp.float32(decay)

    def update(self, params: Mapping[str, jax.Array], applied: jax.Array) -> None:
        """Takes in the parameters after a step.

        Args:
          applied: bool scalar, on the device: False for a skipped step, which changes nothing. The host does not wait for it.
        """
        self.params = _blend(self.params, dict(params), applied, self._decay)


def require_possible(config: Config) -> None:
    """Raises UserError for a configuration whose average could not be kept."""
    if config.training.ema_decay is None:
        if config.evaluation.ema:
            raise UserError("evaluation.ema scores the moving average, but training.ema_decay is not set; set it (such as 0.999) or leave evaluation.ema out")
    elif config.backend != "xla":
        raise UserError(
            f"training.ema_decay={config.training.ema_decay} works with backend: xla, found backend: {config.backend}; leave it out and average the run's checkpoints "
            "instead: `mindvl average --weights RUN:all --method ema --decay 0.9 --out DIR`"
        )
