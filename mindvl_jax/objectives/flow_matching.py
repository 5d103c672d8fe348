"""Learn to undo noise along a path (`paths.py`): flow matching (Lipman et al., 2023; Liu et al., 2023), and prediction
of the noise (Ho et al., 2020) or of v (Salimans and Ho, 2022).

Legend: B samples, X shape of one sample.

A sample at time t is x_t = alpha(t) x_0 + sigma(t) e with e ~ N(0, 1): t = 0 is data, t = 1 is noise. On the straight
path of flow matching sigma(t) = t, and the model predicts e - x_0.

Noise, noise level and dropped conditions are drawn for each sample from its own number (its position in the data
stream), in float32: they are the same under any mesh, any accumulation, and after a resume.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.config.schema import FlowMatchingConfig
from mindvl_jax.objectives.base import LossTerms, Params
from mindvl_jax.objectives.paths import STEPS, STRAIGHT, Path, Weighting, bell, shifted

# the loss is shown by equal parts of the noise levels: late ones say what is seen, early ones whether it is consistent
TIME_BINS = 4


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Flow matching for any model with three methods.

    `clean(batch)` gives the data (B, *X) float32, `conditions(batch, withheld_B)` what the model is told of each
    sample, and `velocity(noisy, times_B, conditions)` the prediction (B, *X). Reads of a batch: `weights` and
    `numbers`, both (B,).

    Attributes:
      times: how noise levels are drawn. uniform; logit_normal: sigmoid of a standard normal, which prefers the middle.
      shift: noise levels become shift * t / (1 + (shift - 1) * t); above 1 noisier ones are preferred.
      condition_dropout: share of the samples whose condition is withheld, for guidance.
      tokens: of one sample, for display.
      path: from data to noise, and what is predicted. On a path of betas a time is rounded down to a step of 1,000.
      weighting: of a sample's error. min_snr: min(snr, snr_gamma) / snr for epsilon, / (snr + 1) for v (Hang et al.,
        2023); bell: prefers the middle of a straight path.
    """

    times: Literal["uniform", "logit_normal"]
    shift: float
    condition_dropout: float
    tokens: int
    path: Path = STRAIGHT
    weighting: Weighting = "none"
    snr_gamma: float = 5.0
    uses_key: bool = True
    gradients_by: str = "sample"
    aux_shapes: None = None

    @property
    def metric_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"tokens": (), "samples": (), "by_time": (TIME_BINS, 2)}

    def draw(
        self, key: jax.Array, numbers_B: jax.Array, shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noise (B, *shape), noise levels (B,) and withheld conditions (B,) bool of the samples with these numbers."""
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B)
        noise_key_B, time_key_B, drop_key_B = (
            jax.vmap(jax.random.fold_in, (0, None))(key_B, part) for part in range(3)
        )
        noise = jax.vmap(lambda one: jax.random.normal(one, shape, jnp.float32))(noise_key_B)
        if self.times == "uniform":
            times_B = jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32))(time_key_B)
        else:
            times_B = jax.nn.sigmoid(jax.vmap(lambda one: jax.random.normal(one, (), jnp.float32))(time_key_B))
        times_B = shifted(times_B, self.shift)
        if not self.path.straight:
            times_B = jnp.clip(jnp.floor(times_B * STEPS), 0, STEPS - 1) / STEPS
        withheld_B = jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32))(drop_key_B) < self.condition_dropout
        return noise, times_B, withheld_B

    def levels(self, times_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma), both (B,) float32, at times of `draw`."""
        if self.path.straight:
            return 1 - times_B, times_B
        steps_B = jnp.round(times_B * STEPS).astype(jnp.int32)
        alpha, sigma = (jnp.asarray(column, jnp.float32) for column in self.path.table())
        return alpha[steps_B], sigma[steps_B]

    def weigh(self, times_B: jax.Array) -> jax.Array:
        """(B,) float32 weight of an error at these times."""
        if self.weighting == "none":
            return jnp.ones_like(times_B)
        if self.weighting == "bell":
            least, mean = bell(self.shift)
            return jnp.maximum(jnp.exp(-2 * (times_B - 0.5) ** 2) - least, 0) / (mean - least)
        alpha_B, sigma_B = self.levels(times_B)
        # In terms of alpha and sigma, as snr = alpha^2 / sigma^2 is 0 at a step of noise alone.
        capped_B = jnp.minimum(alpha_B**2, self.snr_gamma * sigma_B**2)
        return capped_B / alpha_B**2 if self.path.target == "epsilon" else capped_B  # alpha^2 + sigma^2 = 1

    def loss(self, model: nnx.Module, batch: Mapping[str, jax.Array], key: jax.Array) -> LossTerms:
        """Mean squared error of each sample, averaged over the samples by their weights."""
        clean, weights_B = model.clean(batch), batch["weights"]
        with jax.named_scope("noise"):
            noise, times_B, withheld_B = self.draw(key, batch["numbers"], clean.shape[1:])
            alpha, sigma = (level.reshape(-1, *[1] * (clean.ndim - 1)) for level in self.levels(times_B))
            noisy = alpha * clean + sigma * noise
            if self.path.target == "velocity":
                target = noise - clean
            else:
                target = noise if self.path.target == "epsilon" else alpha * noise - sigma * clean
        predicted = model.velocity(noisy, times_B, model.conditions(batch, withheld_B))
        with jax.named_scope("loss"):
            errors_B = jnp.mean(jnp.square(predicted - target), axis=tuple(range(1, clean.ndim)))
            if self.weighting != "none":
                errors_B = errors_B * self.weigh(times_B)
            bins_B = jnp.clip((times_B * TIME_BINS).astype(jnp.int32), 0, TIME_BINS - 1)
            in_bin_BT = weights_B[:, None] * (bins_B[:, None] == jnp.arange(TIME_BINS))
            by_time = jnp.stack([jnp.sum(in_bin_BT * errors_B[:, None], 0), jnp.sum(in_bin_BT, 0)], -1)
            samples = jnp.sum((weights_B > 0).astype(jnp.float32))
        metrics = {"tokens": samples * self.tokens, "samples": samples, "by_time": by_time}
        return LossTerms(jnp.sum(weights_B * errors_B), jnp.sum(weights_B), metrics)

    def for_validation(self) -> FlowMatching:
        return dataclasses.replace(self, condition_dropout=0.0)

    def after_update(self, params: Params, aux: None) -> Params:
        return params

    def display(self, values: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
        """Samples and tokens, and the mean loss of each part of the noise levels as `loss/noise 0.00-0.25`, ..."""
        edges = [number / TIME_BINS for number in range(TIME_BINS + 1)]
        names = [f"loss/noise {low:.2f}-{high:.2f}" for low, high in itertools.pairwise(edges)]
        losses = {
            name: total / weight
            for name, (total, weight) in zip(names, values["by_time"].tolist(), strict=True)
            if weight > 0
        }
        return losses | {name: int(values[name].item()) for name in ("tokens", "samples")}


def for_phase(config: FlowMatchingConfig, *, tokens: int) -> FlowMatching:
    """The objective of a run; `tokens` of one sample."""
    return FlowMatching(
        times=config.times,
        shift=config.shift,
        condition_dropout=config.condition_dropout,
        tokens=tokens,
        path=Path(config.target, config.betas, config.zero_terminal_snr),
        weighting=config.weighting,
        snr_gamma=config.snr_gamma,
    )
