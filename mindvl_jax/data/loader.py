"""Batches for one process, prepared ahead of the step, resumable to the bit."""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import threading
from typing import Any, Iterator

import numpy as np

from mindvl_jax.batch import PackedBatch
from mindvl_jax.config import Config, TokenizerConfig
from mindvl_jax.data.cache import shared_cache
from mindvl_jax.data.collate import batch_shape, budgets_of, collate
from mindvl_jax.data.example import EncodeLimits, Example, ExampleEncoder
from mindvl_jax.data.packing import WorkModel
from mindvl_jax.data.planner import Planner
from mindvl_jax.data.quarantine import Quarantine
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources import open_sources
from mindvl_jax.data.stream import MixtureStream
from mindvl_jax.data.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.errors import UserError

STATE_FORMAT = 1


def make_loader(config: Config, phase_index: int, *, process_index: int = 0, process_count: int = 1, seed: int | None = None) -> "Loader":
    """The loader of a phase for one process.

    Args:
      seed: order of the data; default: from run.seed and the phase.
    Raises UserError for sources that cannot be read, or rows that do not divide among the processes.
    """
    phase = config.training.phases[phase_index]
    if phase.rows % process_count:
        raise UserError(f"training.phases[{phase_index}].rows ({phase.rows}) must be a multiple of the {process_count} processes")
    names = list(dict.fromkeys(entry.source for entry in phase.mixture))
    weights = {name: sum(entry.weight for entry in phase.mixture if entry.source == name) for name in names}
    sources = open_sources(config.data.sources, names)
    seed = int(np.random.SeedSequence([config.run.seed, phase_index]).generate_state(1)[0]) if seed is None else seed
    stream = MixtureStream(sources, [weights[name] for name in names], seed)
    tokenizer = _tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, model.text.vocab_size is {config.model.text.vocab_size}; the model must not be smaller")
    suffix = f"-{process_index}" if process_index else ""
    quarantine = Quarantine(
        os.path.join(config.run.dir, f"quarantine{suffix}.jsonl"),
        policy=config.data.on_error,
        max_rate=config.data.max_error_rate,
        limit_in_a_row=min(2 * stream.records + 16, 5000),
    )
    shape = batch_shape(config, phase)
    limits = training_limits(config, phase_index)
    encoding = (config.model.model_dump_json(), config.tokenizer.model_dump_json(), limits)
    planner = Planner(
        stream,
        ExampleEncoder(config.model, tokenizer, limits),
        budgets_of(shape),
        rows=phase.rows,
        work=WorkModel.of(config.model),
        buffer=config.data.packing_buffer,
        quarantine=quarantine,
        cache=shared_cache(encoding) if config.data.cache_examples else None,
    )
    return Loader(planner, quarantine, config, phase_index=phase_index, process_index=process_index, process_count=process_count, seed=seed, pad_id=tokenizer.pad_id)


@functools.lru_cache(maxsize=4)
def _tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Reading 151,000 entries takes a second; every phase asks for the same ones."""
    return load_tokenizer(config)


def training_limits(config: Config, phase_index: int) -> EncodeLimits:
    """Budgets and pixel rules of a phase for one sample."""
    phase, vision, data = config.training.phases[phase_index], config.model.vision, config.data
    largest = phase.max_image_patches or phase.max_pixels // vision.patch_size**2
    return EncodeLimits(
        min_pixels=phase.min_pixels,
        max_pixels=phase.max_pixels,
        max_tokens=min(phase.max_sample_length or phase.sequence_length, phase.sequence_length),
        max_patches=phase.patches_per_row,
        limit_image_patches=min(largest, phase.patches_per_row),
        train_on=data.train_on,
        resample=data.resample,
        video_fps=data.video_fps,
        video_max_frames=data.video_max_frames,
    )


@dataclasses.dataclass(frozen=True)
class _Ready:
    batch: PackedBatch
    state: dict[str, Any]
    counters: dict[str, Any]


class Loader:
    """Endless iterator of this process's rows of one micro-step after another.

    `state()` and `counters` describe the data up to the last batch that was handed out, whatever has been prepared beyond.
    """

    def __init__(self, planner: Planner, quarantine: Quarantine, config: Config, *, phase_index: int, process_index: int, process_count: int, seed: int, pad_id: int):
        phase = config.training.phases[phase_index]
        rows = phase.rows // process_count
        self._own = slice(process_index * rows, (process_index + 1) * rows)
        self._shape = dataclasses.replace(batch_shape(config, phase), rows=rows)
        self._planner = planner
        self._quarantine = quarantine
        self._vision = config.model.vision
        self._resample = config.data.resample
        self._pad_id = pad_id
        self._prefetch = config.data.prefetch
        self._identity = {"format": STATE_FORMAT, "phase": phase.name, "phase_index": phase_index, "seed": seed}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=self._prefetch)
        self._state = self._snapshot()
        self.counters: dict[str, Any] = planner.counters()

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        """The next batch. Raises UserError when the data cannot go on (see `Quarantine`)."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, args=(self._queue, self._stop), name="mindvl-data", daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # whoever asks again gets the same answer
            raise item
        self._state, self.counters = item.state, item.counters
        return item.batch

    def state(self) -> dict[str, Any]:
        """JSON-able state after the last batch handed out; independent of the number of processes."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after `state`: the next batch is the one that would have come then, bit for bit.

        Raises UserError when the state belongs to another phase or seed, or the data has changed.
        """
        for key, here in self._identity.items():
            if state.get(key) != here:
                raise UserError(f"the checkpoint's data state has {key} {state.get(key)!r}, this run has {here!r}; resume with the configuration of the checkpoint, or set run.resume to `never`")
        self._halt()
        self._planner.restore(state["planner"])
        self._stop = threading.Event()
        self._queue = queue.Queue(maxsize=self._prefetch)
        self._state, self.counters = self._snapshot(), self._planner.counters()

    def close(self) -> None:
        """Stops preparing batches."""
        self._halt()
        self._stop.set()

    # --- background ---

    def _snapshot(self) -> dict[str, Any]:
        return {**self._identity, "planner": self._planner.state()}

    def _halt(self) -> None:
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # a producer that waits for room must be able to end
            except queue.Empty:
                pass
        self._thread = None

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                rows = [self._with_pixels(row) for row in self._planner.next_rows()[self._own]]
                batch = collate(rows, self._shape, pad_id=self._pad_id, vision=self._vision)
                ready.put(_Ready(batch, self._snapshot(), self._planner.counters()))
        except BaseException as error:  # handed to the consumer, who raises it where the run can end cleanly
            ready.put(error)

    def _with_pixels(self, row: list[tuple[int, Example]]) -> list[Example]:
        """Reads the pixels of a row. What does not decode leaves a gap in its row: other processes have planned with it too."""
        read = []
        for position, example in row:
            if example.pixels is None:
                try:
                    example = example.with_pixels(self._vision, self._resample)
                except SampleError as error:
                    self._quarantine.refuse(id=example.id, where=self._planner.where(position), error=error, stage="decode")
                    continue
                self._planner.remember(position, example)
            self._quarantine.decoded()
            read.append(example)
        return read
