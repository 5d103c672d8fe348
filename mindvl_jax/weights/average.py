"""Averages of weights: checkpoints of different steps, runs and sequence lengths become one model.

One model is in memory at a time beside the running sum, which is kept in float32 and spread as the parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from mindvl_jax.checkpoints.checkpoint import CheckpointReader, locate
from mindvl_jax.core.errors import UserError

Parameters = Mapping[str, jax.Array]


@jax.jit
def _add(total: jax.Array, value: jax.Array, weight: jax.Array) -> jax.Array:
    return total + weight * value.astype(jnp.float32)


class RunningAverage:
    """A weighted sum of parameter sets of one shape."""

    def __init__(self):
        self._sum: dict[str, jax.Array] = {}
        self._dtypes: dict[str, jnp.dtype] = {}
        self.weight = 0.0

    def add(self, parameters: Parameters, weight: float, name: str) -> None:
        """Add one set.

        Args:
          name: what to call it when it does not fit the ones before.

        Raises:
          UserError: other parameters or shapes than the first set has; up to five are named.
        """
        if not self._sum:
            self._dtypes = {path: value.dtype for path, value in parameters.items()}
            self._sum = {
                path: _add(jnp.zeros_like(value, jnp.float32), value, jnp.float32(weight))
                for path, value in parameters.items()
            }
        else:
            wrong = [f"{path} is missing" for path in self._sum if path not in parameters]
            wrong += [f"{path} is new" for path in parameters if path not in self._sum]
            wrong += [
                f"{path} is {value.shape}, not {self._sum[path].shape}"
                for path, value in parameters.items()
                if path in self._sum and value.shape != self._sum[path].shape
            ]
            if wrong:
                raise UserError(
                    f"{name} is not of the same architecture as the first model: {'; '.join(wrong[:5])}"
                    + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
                )
            for path, value in parameters.items():
                value = jax.device_put(value, self._sum[path].sharding)
                self._sum[path] = _add(self._sum[path], value, jnp.float32(weight))
        self.weight += weight

    def result(self) -> dict[str, jax.Array]:
        """The average, in the dtypes of the first set. Raises UserError when nothing, or only weight 0, was added."""
        if not self.weight > 0:
            raise UserError("an average needs at least one model of positive weight")
        return {path: (total / self.weight).astype(self._dtypes[path]) for path, total in self._sum.items()}


def weighted(names: Sequence[str], load: Callable[[str], Parameters], weights: Sequence[float]) -> dict[str, jax.Array]:
    """Weighted mean; the weights are normalised.

    Raises:
      UserError: not one weight for each model, weights that are negative or not finite, models of other architectures.
    """
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} weights for {len(names)} models; give one for each, in order")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise UserError(f"weights {list(weights)}: expected numbers from 0 upwards")
    average = RunningAverage()
    for name, weight in zip(names, weights, strict=True):
        average.add(load(name), weight, name)
    return average.result()


def ema_weights(count: int, decay: float) -> list[float]:
    """Weights that an exponential moving average with `decay` gives to `count` models in order, the newest last.

    The first model is the starting point and keeps `decay ** (count - 1)`; the weights sum to 1.
    """
    if not 0 <= decay < 1:
        raise UserError(f"decay is {decay}, expected at least 0 and below 1")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - index) for index in range(1, count)]


def greedy_soup(
    names: Sequence[str], load: Callable[[str], Parameters], score: Callable[[Parameters, str], float]
) -> tuple[dict[str, jax.Array], list[dict]]:
    """Greedy soup (Wortsman et al. 2022): from the best model on, each next one stays in if the average does not get
    worse.

    Args:
      score: of parameters on a validation split, higher is better; the second argument is a label for people.

    Returns:
      the soup, and for each model what was tried: {"model", "alone", "with", "kept"} in order.
    """
    alone = {name: score(load(name), name) for name in names}
    order = sorted(names, key=lambda name: -alone[name])
    kept = [order[0]]
    best = alone[order[0]]
    soup = None
    steps = [{"model": order[0], "alone": best, "with": best, "kept": True}]
    for name in order[1:]:
        trial = weighted([*kept, name], load, [1.0] * (len(kept) + 1))
        value = score(trial, f"average of {len(kept) + 1}")
        stays = value >= best
        steps.append({"model": name, "alone": alone[name], "with": value, "kept": stays})
        if stays:
            kept.append(name)
            best, soup = value, trial
    return (dict(load(kept[0])) if soup is None else soup), steps


def expand(paths: Sequence[str]) -> Iterator[str]:
    """Models named on the command line; `RUN:all` stands for every checkpoint of a run, oldest first.

    Raises:
      UserError: a run without checkpoints.
    """
    for path in paths:
        folder, _, which = path.rpartition(":")
        if which != "all" or not folder:
            yield path
            continue

        with CheckpointReader(folder) as reader:
            steps = sorted(reader.candidates)
        if not steps:
            raise UserError(f"{folder} has no complete checkpoint")
        place, _ = locate(folder)
        yield from (str(place / str(step)) for step in steps)
