"""Loss on held-out samples while a phase trains: the same samples at every check, each exactly once."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, write_json
from mindvl_jax.data.batch import Batch, BatchShape
from mindvl_jax.data.encoding import InlineDecoder, encode_record
from mindvl_jax.data.example import Example, ExampleEncoder
from mindvl_jax.data.loader import cached_tokenizer, training_limits
from mindvl_jax.data.packing.collate import budgets_of, collate, size_of
from mindvl_jax.data.packing.rows import WorkModel, plan_rows
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.parallel.rules import replicated, row_sharding
from mindvl_jax.core.params import Outline
from mindvl_jax.training.state import TrainState

BEST = "best.json"


class Validation:
    """Validation of one phase.

    Args:
      index: of the phase. shape: of its global batch. rows: this process's part of the rows.
      compile: the backend's, with the mesh given. shardings: of the state.

    Raises:
      UserError: the source cannot be read, or none of its samples can be used.
    """

    def __init__(self, config: Config, index: int, *, outline: Outline, mesh: Mesh, shape: BatchShape, rows: slice, compile: Callable, shardings: TrainState):
        settings, phase = config.validation, config.training.phases[index]
        self._settings, self._config, self._shape, self._own = settings, config, shape, rows
        self._mesh = mesh
        self._pad_id = cached_tokenizer(config.tokenizer).pad_id
        self._batches = _plan(config, index, shape)
        self.samples = sum(len(row) for batch in self._batches for row in batch)
        bounds = {name: value for name, value in (("max_sample_length", phase.max_sample_length), ("max_image_patches", phase.max_image_patches)) if value is not None}

        def terms(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = outline.merge({**state.trained, **state.frozen})
            losses_BT = model.token_losses(batch, chunk=config.training.loss_chunk, **bounds)
            return jnp.sum(losses_BT), jnp.sum(batch.loss_weights.astype(jnp.float32))

        scalar = replicated(mesh)
        self._terms = compile(terms, in_shardings=(shardings, row_sharding(mesh)), out_shardings=(scalar, scalar))

    def due(self, step: int, *, ended: bool) -> bool:
        """Return whether to check after this optimizer step."""
        return ended or step % self._settings.every_steps == 0

    def loss(self, state: TrainState) -> tuple[float, float]:
        """Return (mean loss of the labelled tokens, seconds it took)."""
        started = time.perf_counter()
        numerator = denominator = 0.0
        for batch in self._batches:
            total, weight = jax.device_get(self._terms(state, self._placed(batch)))
            numerator, denominator = numerator + float(total), denominator + float(weight)
        return numerator / denominator if denominator else math.nan, time.perf_counter() - started

    def _placed(self, rows: list[list[Example]]) -> Batch:
        decoder = InlineDecoder(self._config.model.vision, self._config.data.resample)
        own = [[(0, example) for example in row] for row in rows[self._own]]
        shape = dataclasses.replace(self._shape, rows=len(own))
        packed = collate(decoder.finish(decoder.begin(own)).rows, shape, pad_id=self._pad_id, vision=self._config.model.vision)
        sharding = row_sharding(self._mesh)
        if jax.process_count() == 1:
            return jax.device_put(packed.batch, sharding)
        place = lambda values: jax.make_array_from_process_local_data(sharding, values)
        return Batch(**{name: place(values) for name, values in packed.batch.fields().items()})


def _plan(config: Config, index: int, shape: BatchShape) -> list[list[list[Example]]]:
    """Rows of each batch, without pixels. Every process plans the same."""
    settings, name = config.validation, config.validation.source
    source = Source(name, config.data.sources[name])
    chosen = range(len(source))
    if settings.samples is not None and settings.samples < len(source):
        chosen = sorted(np.random.default_rng(0).permutation(len(source))[: settings.samples].tolist())
    encoder = ExampleEncoder(config.model, cached_tokenizer(config.tokenizer), training_limits(config, index))
    budgets, work = budgets_of(shape), WorkModel.of(config.model)
    outcomes = [encode_record(source, number, encoder, budgets) for number in chosen]
    waiting = [outcome for outcome in outcomes if not isinstance(outcome, SampleError)]
    if not waiting:
        reasons = collections.Counter(outcome.reason for outcome in outcomes)
        raise UserError(f"validation.source={name}: none of {len(outcomes)} samples can be used ({', '.join(f'{reason} {count}' for reason, count in reasons.items())}): {outcomes[0]}")
    batches = []
    while waiting:
        sizes = np.array([size_of(example) for example in waiting], np.int64)
        loads = np.array([work.loads(example.length, example.image_lengths) for example in waiting])
        planned = plan_rows(sizes, loads, budgets, shape.rows)
        batches.append([[waiting[number] for number in row] for row in planned])
        used = {number for row in planned for number in row}
        waiting = [example for number, example in enumerate(waiting) if number not in used]
    return batches


class Best:
    """The step with the lowest validation loss so far, in RUN/best.json."""

    def __init__(self, run_dir: Path, *, resumed: int):
        """`resumed` is the step the run goes on from: a best step beyond it is walked again."""
        self._path = run_dir / BEST
        known = read_json(self._path) if resumed else None
        self.step: int | None = None
        self.loss = math.inf
        if known is not None and known["step"] <= resumed and (run_dir / "checkpoints" / str(known["step"])).is_dir():
            self.step, self.loss = int(known["step"]), float(known["validation_loss"])

    def offer(self, step: int, loss: float, *, write: bool) -> bool:
        """Take a new lowest loss; return whether it is one."""
        if not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        if write:
            write_json(self._path, {"step": step, "validation_loss": loss, "checkpoint": f"checkpoints/{step}"})
        return True
