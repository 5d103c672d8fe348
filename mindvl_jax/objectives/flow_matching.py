"""Flow matching along straight paths: predict the direction from data to noise (Lipman et al., 2023; Liu et al., 2023).

Legend: B samples, X shape of one sample.

A sample at noise level t is x_t = (1 - t) x_0 + t e with e ~ N(0, 1): t = 0 is data, t = 1 is noise. The model predicts
e - x_0.

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
    """

    times: Literal["uniform", "logit_normal"]
    shift: float
    condition_dropout: float
    tokens: int
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
        times_B = self.shift * times_B / (1 + (self.shift - 1) * times_B)
        withheld_B = jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32))(drop_key_B) < self.condition_dropout
        return noise, times_B, withheld_B

    def loss(self, model: nnx.Module, batch: Mapping[str, jax.Array], key: jax.Array) -> LossTerms:
        """Mean squared error of each sample, averaged over the samples by their weights."""
        clean, weights_B = model.clean(batch), batch["weights"]
        with jax.named_scope("noise"):
            noise, times_B, withheld_B = self.draw(key, batch["numbers"], clean.shape[1:])
            level = times_B.reshape(-1, *[1] * (clean.ndim - 1))
            noisy = (1 - level) * clean + level * noise
        predicted = model.velocity(noisy, times_B, model.conditions(batch, withheld_B))
        with jax.named_scope("loss"):
            errors_B = jnp.mean(jnp.square(predicted - (noise - clean)), axis=tuple(range(1, clean.ndim)))
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
        times=config.times, shift=config.shift, condition_dropout=config.condition_dropout, tokens=tokens
    )
