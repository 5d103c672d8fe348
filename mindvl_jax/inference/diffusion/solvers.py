"""Solvers from noise (time 1) to data (time 0): tables in float64 on the host, one `lax.scan` over their rows.

B samples, X shape of one sample, S steps.

Every solver here is linear in the sample and in the last three predictions of the data, so one program runs them all:

    clean     = keep * x + of_prediction * prediction
    corrected = c_x * x + c_last * last + c_0 * clean + c_1 * clean_1 + c_2 * clean_2
    next x    = p_x * corrected + p_0 * clean + p_1 * clean_1 + noise * e

where clean_1 and clean_2 are those of the two steps before, `last` is the corrected sample of the step before, and
only UniPC corrects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mindvl_jax.objectives.paths import STEPS, Path, shifted

Model = Callable[[jax.Array, jax.Array], jax.Array]
"""(x (B, *X) float32, times (B,) float32) -> prediction (B, *X) float32, of the path's target."""

Solver = Literal["euler", "ddim", "dpmpp_2m", "unipc", "ancestral"]
SOLVERS: tuple[str, ...] = ("euler", "ddim", "dpmpp_2m", "unipc", "ancestral")

# Log-SNR is infinite at time 1 of a straight path; the reference schedulers start this much below it too.
NEAR_ONE = 1e-6


def noise_levels(steps: int, shift: float = 1.0) -> np.ndarray:
    """(S + 1,) float64: times from 1 down to 0, evenly spaced, then shifted as in training.

    Raises:
      ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"{steps} steps with shift {shift}: expected at least one step and a positive shift")
    return shifted(np.linspace(1.0, 0.0, steps + 1), shift)


def trailing_times(steps: int) -> np.ndarray:
    """(S + 1,) float64 times of the published steps 999, .., evenly spaced from the last one (`trailing`), then -1 for
    data.
    """
    if not 1 <= steps <= STEPS:
        raise ValueError(f"{steps} steps: expected 1 to {STEPS}")
    indexes = np.round(np.arange(STEPS, 0, -STEPS / steps)) - 1
    return np.append(indexes / STEPS, -1.0)


@dataclasses.dataclass(frozen=True)
class Table:
    """Coefficients of S steps, each (S,) float64; see the module for their meaning."""

    times: np.ndarray
    keep: np.ndarray
    of_prediction: np.ndarray
    correct: np.ndarray  # (S, 5): c_x, c_last, c_0, c_1, c_2
    predict: np.ndarray  # (S, 3): p_x, p_0, p_1
    noise: np.ndarray


def table(solver: Solver, path: Path, times: np.ndarray) -> Table:
    """Coefficients of a solver along a path.

    Args:
      times: (S + 1,) from noise to data, decreasing; the last, 0 or less, is the data themselves.

    Raises:
      ValueError: an unknown solver; times that do not decrease; euler without a straight path; ancestral on one.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2 or np.any(np.diff(times) >= 0):
        raise ValueError(f"times {times.tolist()} must decrease, from noise to data")
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    if solver == "euler" and not path.straight:
        raise ValueError(f"solver euler follows straight paths (target velocity), not target {path.target}; use ddim")
    if solver == "ancestral" and path.straight:
        raise ValueError("solver ancestral needs a path of betas (target epsilon or v), not target velocity")
    alpha, sigma = path.at(times[:-1])
    if path.straight and solver in ("dpmpp_2m", "unipc"):
        sigma = np.where(sigma > 1 - NEAR_ONE, 1 - NEAR_ONE, sigma)
        alpha = 1 - sigma
    keep, of_prediction = path.clean_from(alpha, sigma)
    end_alpha, end_sigma = (1.0, 0.0) if times[-1] <= 0 else (float(value) for value in path.at(times[-1]))
    alpha, sigma = np.append(alpha, end_alpha), np.append(sigma, end_sigma)
    count = len(times) - 1
    correct, predict, noise = np.tile([1.0, 0, 0, 0, 0], (count, 1)), np.zeros((count, 3)), np.zeros(count)
    for step in range(count):
        if solver in ("euler", "ddim"):
            predict[step] = _first_order(alpha, sigma, step)
        elif solver == "ancestral":
            predict[step], noise[step] = _ancestral(alpha, sigma, step)
        elif solver == "dpmpp_2m":
            predict[step] = _dpmpp_2m(alpha, sigma, step)
        else:
            predict[step] = _unipc_predictor(alpha, sigma, step)
            if step:
                correct[step] = _unipc_corrector(alpha, sigma, step)
    return Table(times[:-1], keep, of_prediction, correct, predict, noise)


def _first_order(alpha, sigma, step: int) -> list[float]:
    """Keep the predicted noise, move to the next level: DDIM, and Euler's step on a straight path."""
    ratio = sigma[step + 1] / sigma[step]
    return [ratio, alpha[step + 1] - ratio * alpha[step], 0.0]


def _ancestral(alpha, sigma, step: int) -> tuple[list[float], float]:
    """Euler's step to a lower level than the next, then noise up to it (Karras et al., 2022; levels sigma / alpha)."""
    target = sigma[step + 1] / alpha[step + 1]
    # Squared ratio of the levels; written so that a first step of noise alone (alpha 0) divides by nothing.
    ratio = (target * alpha[step] / sigma[step]) ** 2
    down = target**2 * alpha[step] / sigma[step] ** 2
    return [alpha[step + 1] * down, alpha[step + 1] * (1 - ratio), 0.0], alpha[step + 1] * target * np.sqrt(1 - ratio)


def _log_snr(alpha, sigma, step: int) -> float:
    """Half of it: log(alpha / sigma); plus and minus infinity at the ends."""
    with np.errstate(divide="ignore"):
        return float(np.log(alpha[step]) - np.log(sigma[step]))


def _dpmpp_2m(alpha, sigma, step: int) -> list[float]:
    """DPM-Solver++(2M), midpoint (Lu et al., 2022); first order at the first step and into the data."""
    now, target = _log_snr(alpha, sigma, step), _log_snr(alpha, sigma, step + 1)
    factor = -alpha[step + 1] * np.expm1(now - target)
    row = [sigma[step + 1] / sigma[step], factor, 0.0]
    if step and sigma[step + 1] > 0:
        ratio = (now - _log_snr(alpha, sigma, step - 1)) / (target - now)
        slope = factor / (2 * ratio)
        row = [row[0], factor + slope, -slope]
    return row


def _unipc_predictor(alpha, sigma, step: int) -> list[float]:
    """UniP-2 with B(h) = e^h - 1 (Zhao et al., 2023); first order at the first step and into the data."""
    now, target = _log_snr(alpha, sigma, step), _log_snr(alpha, sigma, step + 1)
    factor = -alpha[step + 1] * np.expm1(now - target)
    if step == 0 or sigma[step + 1] == 0:
        return [sigma[step + 1] / sigma[step], factor, 0.0]
    ratio = (_log_snr(alpha, sigma, step - 1) - now) / (target - now)
    slope = 0.5 * factor / ratio
    return [sigma[step + 1] / sigma[step], factor - slope, slope]


def _unipc_corrector(alpha, sigma, step: int) -> list[float]:
    """UniC of the order that the predictor had in the step before: 1 after the first step, 2 later."""
    before, now = _log_snr(alpha, sigma, step - 1), _log_snr(alpha, sigma, step)
    h = now - before
    factor = -alpha[step] * np.expm1(-h)
    last = sigma[step] / sigma[step - 1]
    if step == 1:
        return [0.0, last, 0.5 * factor, 0.5 * factor, 0.0]
    ratio = (_log_snr(alpha, sigma, step - 2) - before) / h
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    earlier, current = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
    # factor multiplies: clean_1 + earlier * (clean_2 - clean_1) / ratio + current * (clean_0 - clean_1)
    return [0.0, last, factor * current, factor * (1 - earlier / ratio - current), factor * earlier / ratio]


class Carry(NamedTuple):
    """What one step hands to the next, each (B, *X) float32: the sample, and what multistep solvers remember."""

    x: jax.Array
    last: jax.Array
    clean_1: jax.Array
    clean_2: jax.Array


def begin(noise: jax.Array) -> Carry:
    start = noise.astype(jnp.float32)
    zero = jnp.zeros_like(start)
    return Carry(start, zero, zero, zero)


def columns(rows: Table) -> list[jax.Array]:
    """The table in float32 and the number of each step, for `advance`."""
    parts = [rows.times, rows.keep, rows.of_prediction, rows.correct, rows.predict, rows.noise]
    return [jnp.asarray(part, jnp.float32) for part in parts] + [jnp.arange(len(rows.times))]


def advance(model: Model, carry: Carry, row: Sequence[jax.Array], key_B: jax.Array | None = None) -> Carry:
    """One step, by one row of `columns`.

    Args:
      key_B: a key of each sample, of solvers that add noise; None adds none.
    """
    x, last, clean_1, clean_2 = carry
    time, keep, of_prediction, correct, predict, level, number = row
    clean = keep * x + of_prediction * model(x, jnp.broadcast_to(time, (len(x),)))
    x = correct[0] * x + correct[1] * last + correct[2] * clean + correct[3] * clean_1 + correct[4] * clean_2
    following = predict[0] * x + predict[1] * clean + predict[2] * clean_1
    if key_B is not None:
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:], jnp.float32))
        following = following + level * draw(key_B)
    return Carry(following, x, clean, clean_1)


def solve(model: Model, noise: jax.Array, rows: Table, *, key_B: jax.Array | None = None) -> jax.Array:
    """Data (B, *X) float32 from noise, by one scan over the table.

    Args:
      noise: (B, *X) at the first time.
      key_B: a key of each sample, for tables with noise: a sample's numbers do not depend on its neighbours.

    Raises:
      ValueError: a table with noise without keys.
    """
    noisy = bool(np.any(rows.noise))
    if noisy and key_B is None:
        raise ValueError("this solver adds noise: give the key of each sample")

    def step(carry: Carry, row: Sequence[jax.Array]) -> tuple[Carry, None]:
        return advance(model, carry, row, key_B if noisy else None), None

    return jax.lax.scan(step, begin(noise), columns(rows))[0].x


def guided(
    conditional: Callable[[jax.Array, jax.Array, Any], jax.Array],
    condition: Any,
    nothing: Any,
    scale: float,
) -> Model:
    """Classifier-free guidance: nothing + scale * (condition - nothing), both in one batch of twice the size; scale 1
    asks once.

    Args:
      conditional: (x, levels, conditions) -> prediction.
      condition: array, or pytree of arrays, with a row for each sample.
      nothing: the condition that stands for none, shaped like `condition`.
    """
    if scale == 1.0:
        return lambda x, levels: conditional(x, levels, condition)
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair), condition, nothing)

    def prediction(x: jax.Array, levels: jax.Array) -> jax.Array:
        with_condition, without = jnp.split(
            conditional(jnp.concatenate([x, x]), jnp.concatenate([levels, levels]), both), 2
        )
        return without + scale * (with_condition - without)

    return prediction
