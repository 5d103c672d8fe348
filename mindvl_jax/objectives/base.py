"""The protocol between an objective and the training step.

The step knows nothing of a batch's fields: it differentiates `Objective.loss`, sums `LossTerms` over the micro-steps of
an optimizer step, divides, updates, and hands the summed metrics back for display.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

Params = dict[str, jax.Array]


class LossTerms(NamedTuple):
    """One micro-batch. The loss of an optimizer step is the sum of numerators over the sum of denominators.

    Attributes:
      numerator, denominator: float32 scalars. A step whose denominator is 0 has nothing to learn and changes nothing.
      metrics: float32 arrays by name, summed over the micro-steps.
      aux: pytree of float32 arrays for `after_update`, summed over the micro-steps; None without any.
    """

    numerator: jax.Array
    denominator: jax.Array
    metrics: dict[str, jax.Array]
    aux: Any = None


class Objective(Protocol):
    """A frozen dataclass: equal objectives make equal programs, so phases with equal ones share what was compiled.

    Attributes:
      metric_shapes: shape of each entry of `LossTerms.metrics`.
      aux_shapes: `jax.ShapeDtypeStruct`s shaped like `LossTerms.aux`, None without any.
      uses_key: whether `loss` draws random numbers. If not, the programs hold no key at all.
      gradients_by: name of the reduction, for the line that describes a phase.
    """

    uses_key: bool
    gradients_by: str

    @property
    def metric_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def aux_shapes(self) -> Any: ...

    def loss(self, model: nnx.Module, batch: Any, key: jax.Array | None) -> LossTerms:
        """Loss terms of one micro-batch; differentiated with respect to the model's trained parameters.

        Args:
          key: `fold_in(key(run.seed), step)`, equal for all micro-steps of an optimizer step. Fold in each sample's own
            number (its position in the data stream) before drawing: then the numbers of a sample depend neither on the
            mesh, nor on packing, nor on how many micro-steps a step has.
        """

    def for_validation(self) -> Objective:
        """The objective that held-out samples are scored by: its loss must not depend on how they were batched."""

    def after_update(self, params: Params, aux: Any) -> Params:
        """Trained parameters after the optimizer, with changes that no gradient makes (a router's load balancing).

        Called only with aux.
        """

    def display(self, values: Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
        """Entries of metrics.jsonl from the summed metrics of a step (numpy, on the host).

        Args:
          sources: names of the phase's data sources, by their index.
        """
