"""Loss on held-out samples while a phase trains: the same samples at every check, each exactly once."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mindvl_jax.checkpoints.names import BEST, BEST_FILE, named_folder
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, write_json
from mindvl_jax.core.params import Outline
from mindvl_jax.data.encoding import InlineDecoder, encode_record
from mindvl_jax.data.packing.rows import plan_rows
from mindvl_jax.data.processor import BatchSpec, Example, Processor
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.registry import spec_of
from mindvl_jax.objectives.base import Objective
from mindvl_jax.parallel.rules import batch_sharding, replicated
from mindvl_jax.training.feed import place
from mindvl_jax.training.state import TrainState

log = logging.getLogger(__name__)


class Validation:
    """Validation of one phase, by the objective's own loss.

    Args:
      index: of the phase. objective: that it trains. spec: of its global batch. rows: this process's part of the rows.
      compile: the backend's, with the mesh given. shardings: of the state.

    Raises:
      UserError: the source cannot be read, or none of its samples can be used.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        objective: Objective,
        spec: BatchSpec,
        *,
        outline: Outline,
        mesh: Mesh,
        rows: slice,
        compile: Callable,
        shardings: TrainState,
    ):
        self._settings, self._own = config.validation, rows
        self._processor = spec_of(config.model).processor(config, index)
        self._batches = _plan(config, self._processor, config.training.phases[index].rows)
        self.samples = sum(len(row) for batch in self._batches for row in batch)
        held_out = objective.for_validation()

        def terms(state: TrainState, batch: Any) -> tuple[jax.Array, jax.Array]:
            # The same random numbers at every check, so that losses of different steps can be compared.
            key = jax.random.key(0) if held_out.uses_key else None
            found = held_out.loss(outline.merge({**state.trained, **state.frozen}), batch, key)
            return found.numerator, found.denominator

        scalar = replicated(mesh)
        self._placement = spec.map(lambda field: batch_sharding(field.dims, field.shape, mesh))
        self._terms = compile(terms, in_shardings=(shardings, self._placement), out_shardings=(scalar, scalar))

    def due(self, step: int, *, ended: bool) -> bool:
        """Return whether to check after this optimizer step."""
        return ended or step % self._settings.every_steps == 0

    def loss(self, state: TrainState) -> tuple[float, float]:
        """Return (mean loss, seconds it took)."""
        started = time.perf_counter()
        numerator = denominator = 0.0
        for batch in self._batches:
            total, weight = jax.device_get(self._terms(state, self._placed(batch)))
            numerator, denominator = numerator + float(total), denominator + float(weight)
        return numerator / denominator if denominator else math.nan, time.perf_counter() - started

    def _placed(self, rows: list[list[Example]]) -> Any:
        decoder = InlineDecoder(self._processor)
        own = [[(0, example) for example in row] for row in rows[self._own]]
        return place(self._processor.collate(decoder.finish(decoder.begin(own)).rows).batch, self._placement)


def _plan(config: Config, processor: Processor, rows: int) -> list[list[list[Example]]]:
    """Rows of each batch, without media. Every process plans the same."""
    settings, name = config.validation, config.validation.source
    source = Source(name, config.data.sources[name])
    chosen = range(len(source))
    if settings.samples is not None and settings.samples < len(source):
        chosen = sorted(np.random.default_rng(0).permutation(len(source))[: settings.samples].tolist())
    outcomes = [encode_record(source, number, processor) for number in chosen]
    waiting = [
        dataclasses.replace(outcome, number=number)
        for number, outcome in zip(chosen, outcomes, strict=True)
        if not isinstance(outcome, SampleError)
    ]
    if not waiting:
        reasons = collections.Counter(outcome.reason for outcome in outcomes)
        raise UserError(
            f"validation.source={name}: none of {len(outcomes)} samples can be used "
            f"({', '.join(f'{reason} {count}' for reason, count in reasons.items())}): {outcomes[0]}"
        )
    batches = []
    while waiting:
        costs = [processor.cost(example) for example in waiting]
        planned = plan_rows(
            np.array([cost.size for cost in costs], np.int64),
            np.array([cost.work for cost in costs]),
            processor.budgets,
            rows,
        )
        batches.append([[waiting[number] for number in row] for row in planned])
        used = {number for row in planned for number in row}
        waiting = [example for number, example in enumerate(waiting) if number not in used]
    return batches


class Best:
    """The step with the lowest validation loss so far, in RUN/best.json."""

    def __init__(self, run_dir: Path, *, resumed: int):
        """`resumed` is the step the run goes on from: a best step beyond it is walked again.

        A damaged file is said and not used: the best step is then looked for anew.
        """
        self._path = run_dir / BEST_FILE
        self.step: int | None = None
        self.loss = math.inf
        if not resumed or not self._path.is_file():
            return
        try:
            step = int(named_folder(f"{run_dir}{BEST}")[0].name)
            loss = float(read_json(self._path)["validation_loss"])
        except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("the best step so far is not known, and looked for anew: %s", error)
            return
        if step <= resumed and math.isfinite(loss):
            self.step, self.loss = step, loss

    def offer(self, step: int, loss: float, *, write: bool) -> bool:
        """Take a new lowest loss; return whether it is one."""
        if not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        if write:
            write_json(self._path, {"step": step, "validation_loss": loss, "checkpoint": f"checkpoints/{step}"})
        return True
