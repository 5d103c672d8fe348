"""An exponential moving average of the parameters, kept beside a run (`training.ema_decay`).

After each optimizer step that was applied: average = decay * average + (1 - decay) * parameters, in float32, starting
from the parameters that the run starts with. Skipped steps leave it alone. All parameters are in it, those that a phase
freezes too: they may have learned in the phase before. It lies where the parameters lie and goes into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params
from mindvl_jax.parallel.rules import replicated
from mindvl_jax.training.xla_backend import compile_xla


def _blend(average: Params, params: Params, applied: jax.Array, decay: jax.Array) -> Params:
    keep = jnp.where(applied, decay, jnp.float32(1))
    return {path: keep * average[path] + (1 - keep) * params[path].astype(jnp.float32) for path in average}


class MovingAverage:
    """The average and the program that updates it.

    Args:
      params: where it starts, by path; copied, because training donates the buffers of its parameters.
      decay: share of the old average that a step keeps.
      compile: compiles a pure function for the back end of the run, such as `Backend.compile`.
    """

    def __init__(self, params: Mapping[str, jax.Array], decay: float, compile: Callable[..., Callable] = compile_xla):
        self.params: Params = {path: jnp.array(value, jnp.float32, copy=True) for path, value in params.items()}
        self.shardings = {path: value.sharding for path, value in self.params.items()}
        some = next(iter(self.shardings.values()))
        scalar = replicated(some.mesh) if isinstance(some, NamedSharding) else some
        self._blend = compile(
            _blend,
            in_shardings=(self.shardings, self.shardings, scalar, scalar),
            out_shardings=self.shardings,
            donate_argnums=(0,),
        )
        self._decay = np.float32(decay)

    def update(self, params: Mapping[str, jax.Array], applied: jax.Array) -> None:
        """Take in the parameters after a step.

        Args:
          applied: bool scalar, on the device: False for a skipped step, which changes nothing. The host does not wait
            for it.
        """
        self.params = self._blend(self.params, {path: params[path] for path in self.params}, applied, self._decay)


def require_possible(config: Config) -> None:
    """Raise UserError for a configuration whose average could not be kept."""
    if config.training.ema_decay is None and config.evaluation.ema:
        raise UserError(
            "evaluation.ema scores the moving average, but training.ema_decay is not set; set it (such as "
            "0.999) or leave evaluation.ema out"
        )
