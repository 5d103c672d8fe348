"""Next-token prediction on labelled tokens, with three ways to reduce per-token losses to one number.

Legend: B rows, T tokens, S samples a row, K sources.

Each reduction is a quotient of two sums over the micro-batches of a step, so accumulation, packing and the mesh change
nothing in `token` and `sample`. A step without any label gives 0 / 0, which the training step treats as nothing to
learn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.config.schema import PhaseConfig
from mindvl_jax.models.counts import Counts
from mindvl_jax.objectives.base import LossTerms, Params
from mindvl_jax.parallel import pipeline

Reduction = Literal["token", "sample", "micro_batch"]
SOURCES = "sources"


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning of any model with `token_losses(batch, chunk=, **bounds)`.

    Reads of a batch: loss_weights, segment_ids, source_ids, all (B, T); the model reads the rest.

    Attributes:
      gradients_by: the reduction, see `loss_terms`.
      samples: S, most samples in a row.
      sources: K, rows of the per-source sums. Rows past the last source stay 0.
      chunk: tokens whose logits exist at one time.
      bounds: promises to the model by name, such as max_sample_length.
      counts: what the family counts in a batch.
    """

    gradients_by: Reduction
    samples: int
    sources: int
    chunk: int
    bounds: tuple[tuple[str, int], ...]
    counts: Counts
    uses_key: bool = False
    aux_shapes: None = None

    @property
    def metric_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**dict.fromkeys(self.counts.names, ()), SOURCES: (self.sources, 2)}

    def loss(self, model: nnx.Module, batch: Any, key: None = None) -> LossTerms:
        reduce = functools.partial(
            loss_terms,
            weights_BT=batch.loss_weights,
            segment_ids_BT=batch.segment_ids,
            samples=self.samples,
            reduction=self.gradients_by,
        )
        options = {"chunk": self.chunk, **dict(self.bounds)}
        if pipeline.is_installed():
            # Every reduction is linear in the losses, so its gradient is known before them.
            nothing = jnp.zeros(batch.loss_weights.shape, jnp.float32)
            coefficients_BT = jax.grad(lambda losses_BT: reduce(losses_BT)[0])(nothing)
            numerator, token_losses_BT = model.pipelined_losses(batch, coefficients_BT, **options)
            _, denominator = reduce(token_losses_BT)
        else:
            token_losses_BT = model.token_losses(batch, **options)
        with jax.named_scope("reduce_loss"):
            if not pipeline.is_installed():
                numerator, denominator = reduce(token_losses_BT)
            sums = by_source(token_losses_BT, batch.loss_weights, batch.source_ids, self.sources)
        return LossTerms(numerator, denominator, {**self.counts.function(batch), SOURCES: sums})

    def for_validation(self) -> Sft:
        return dataclasses.replace(self, gradients_by="token")

    def after_update(self, params: Params, aux: None) -> Params:
        return params

    def display(self, values: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
        """Counts as integers, and the mean loss of each source that had labels as `loss/NAME`."""
        sums = values[SOURCES].tolist()
        losses = {
            f"loss/{name}": total / weight for name, (total, weight) in zip(sources, sums, strict=False) if weight > 0
        }
        return losses | {name: int(values[name].item()) for name in self.counts.shown}


def for_phase(phase: PhaseConfig, *, loss_chunk: int, counts: Counts) -> Sft:
    """The objective of one phase of a run; `counts` are those of the model family."""
    # A bound that equals the row promises nothing.
    bounds = {"max_sample_length": phase.max_sample_length, "max_image_patches": phase.max_image_patches}
    return Sft(
        gradients_by=phase.loss_reduction,
        samples=phase.max_samples_per_row,
        sources=source_rows(len(phase.sources)),
        chunk=loss_chunk,
        bounds=tuple((name, bound) for name, bound in bounds.items() if bound is not None),
        counts=counts,
    )


def source_rows(sources: int) -> int:
    """K: the number of sources, rounded up to eights, so that phases of other mixtures run the same programs."""
    return -(-sources // 8) * 8


def loss_terms(
    losses_BT: jax.Array, weights_BT: jax.Array, segment_ids_BT: jax.Array, *, samples: int, reduction: Reduction
) -> tuple[jax.Array, jax.Array]:
    """(numerator, denominator) of one micro-batch, float32 scalars.

    Args:
      losses_BT: weight * negative log-likelihood at each token position, float32.
      weights_BT: the weights that `losses_BT` already carries.
      segment_ids_BT: sample of each position, 0 is padding.
      samples: S, most samples in a row.
      reduction:
        token: sum of losses / sum of weights, over the whole global batch;
        sample: mean over samples of each sample's weighted mean; samples without labels do not count;
        micro_batch: mean over micro-batches (one micro-step's rows) of their weighted means; those without labels do
          not count. MindSpeed-MM's default, without its 0 / 0.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    if reduction == "token":
        return jnp.sum(losses_BT), jnp.sum(weights_BT)
    if reduction == "micro_batch":
        total = jnp.sum(weights_BT)
        return jnp.sum(losses_BT) / _nonzero(total), (total > 0).astype(jnp.float32)
    if reduction == "sample":
        # Compared with scatter-add, the one-hot product is a plain matmul: deterministic, shardable, and S is small.
        member_BTS = (segment_ids_BT[:, :, None] == jnp.arange(1, samples + 1)).astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        weight_BS = jnp.einsum("BT,BTS->BS", weights_BT, member_BTS, precision=exact)
        loss_BS = jnp.einsum("BT,BTS->BS", losses_BT, member_BTS, precision=exact)
        return jnp.sum(loss_BS / _nonzero(weight_BS)), jnp.sum((weight_BS > 0).astype(jnp.float32))
    raise ValueError(f"unknown loss reduction {reduction!r}")


def by_source(losses_BT: jax.Array, weights_BT: jax.Array, source_ids_BT: jax.Array, sources: int) -> jax.Array:
    """(K, 2) float32: sums of losses and of weights over the positions of each of K sources."""
    terms_BT2 = jnp.stack([losses_BT, weights_BT.astype(jnp.float32)], axis=-1)
    of_source_BTK = source_ids_BT[:, :, None] == jnp.arange(sources)
    return jnp.sum(jnp.where(of_source_BTK[..., None], terms_BT2[:, :, None], 0.0), axis=(0, 1))


def _nonzero(x: jax.Array) -> jax.Array:
    """Replace 0 by 1 in a divisor. Its dividend is 0 there too, so the quotient and its gradient are 0, not NaN."""
    return jnp.where(x > 0, x, 1.0)
