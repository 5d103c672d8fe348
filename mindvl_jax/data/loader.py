"""Batches for one process, prepared ahead of the step, resumable to the bit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.cache import shared_cache
from mindvl_jax.data.encoding import InlineDecoder, InlineEncoder
from mindvl_jax.data.packing.lengths import IndexedEncoder, LengthIndex, index_path
from mindvl_jax.data.packing.planner import Planner, RecordEncoder
from mindvl_jax.data.processor import MakeProcessor, PackedBatch, Processor
from mindvl_jax.data.quarantine import Quarantine
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.mixture import MixtureStream
from mindvl_jax.data.sources.readers import open_sources
from mindvl_jax.data.workers import Job, PoolDecoder, PoolEncoder, WorkerPool

STATE_FORMAT = 2
SIGN_OF_LIFE = 60.0  # seconds of waiting for data after which it is said
log = logging.getLogger(__name__)


def make_loader(
    config: Config,
    phase_index: int,
    make_processor: MakeProcessor,
    *,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
) -> Loader:
    """The loader of a phase for one process.

    Args:
      make_processor: of the model's family (`ModelSpec.processor`).
      seed: order of the data; default: from run.seed and the phase.

    Raises:
      UserError: sources that cannot be read, rows that do not divide among the processes, or what the processor
        refuses.
    """
    phase, data = config.training.phases[phase_index], config.data
    if phase.rows % process_count:
        raise UserError(
            f"training.phases[{phase_index}].rows ({phase.rows}) must be a multiple of the {process_count} processes"
        )
    seed = phase_seed(config, phase_index) if seed is None else seed
    stream = phase_stream(config, phase_index, seed)
    processor = make_processor(config, phase_index)
    suffix = f"-{process_index}" if process_index else ""
    quarantine = Quarantine(
        os.path.join(config.run.dir, f"quarantine{suffix}.jsonl"),
        policy=data.on_error,
        max_rate=data.max_error_rate,
        limit_in_a_row=min(2 * stream.records + 16, 5000),
    )
    encoder, decoder = _coders(config, phase_index, make_processor, processor, stream)
    if data.length_index is not None:
        indices = [
            LengthIndex(index_path(data.length_index, source, processor.lengths), source) for source in stream.sources
        ]
        encoder = IndexedEncoder(stream, indices, encoder, processor)
    cache = shared_cache(processor.encoding) if data.cache_examples else None
    planner = Planner(
        stream, encoder, processor, rows=phase.rows, buffer=data.packing_buffer, quarantine=quarantine, cache=cache
    )
    identity = {
        "format": STATE_FORMAT,
        "phase": phase.name,
        "phase_index": phase_index,
        "seed": seed,
        "tokenizer": processor_vocabulary(processor),
    }
    own = phase.rows // process_count
    rows = slice(process_index * own, (process_index + 1) * own)
    return Loader(
        planner,
        encoder,
        decoder,
        quarantine,
        rows=rows,
        collate_rows=processor.collate,
        identity=identity,
        prefetch=data.prefetch,
    )


def processor_vocabulary(processor: Processor) -> str | None:
    """Return the digest of a processor's tokenizer; None for families that read no text."""
    return getattr(getattr(processor, "tokenizer", None), "digest", None)


def phase_seed(config: Config, phase_index: int) -> int:
    """Return the seed of a phase's order of data."""
    return int(np.random.SeedSequence([config.run.seed, phase_index]).generate_state(1)[0])


def phase_stream(config: Config, phase_index: int, seed: int) -> MixtureStream:
    """Return the order of a phase's samples. Raises UserError for sources that cannot be read."""
    phase = config.training.phases[phase_index]
    weights = {name: sum(entry.weight for entry in phase.mixture if entry.source == name) for name in phase.sources}
    return MixtureStream(
        open_sources(config.data.sources, phase.sources), [weights[name] for name in phase.sources], seed
    )


def _coders(
    config: Config, phase_index: int, make_processor: MakeProcessor, processor: Processor, stream: MixtureStream
) -> tuple[RecordEncoder, InlineDecoder | PoolDecoder]:
    """Encoder and decoder, in this process or in `data.workers` others."""
    if not config.data.workers:
        return InlineEncoder(stream, processor), InlineDecoder(processor)
    if config.data.cache_examples:
        raise UserError(
            "data.cache_examples keeps decoded samples in this process and data.workers decodes in others: "
            "set one of them"
        )
    if not hasattr(os, "memfd_create"):
        raise UserError(
            "data.workers hands pixels over in anonymous shared memory, which this system lacks (Linux has "
            "it); set data.workers to 0"
        )
    pool = WorkerPool(Job(config, phase_index, make_processor), config.data.workers)
    decoder = (
        InlineDecoder(processor) if processor.media is None else PoolDecoder(pool, processor.media, processor.media_of)
    )
    return PoolEncoder(stream, pool), decoder


@dataclasses.dataclass(frozen=True)
class _Ready:
    batch: PackedBatch
    state: dict[str, Any]
    counters: dict[str, Any]


class Loader:
    """Endless iterator of this process's rows of one micro-step after another.

    `state()` and `counters` describe the data up to the last batch that was handed out, whatever has been prepared
    beyond.

    Attributes:
      counters: samples, epochs, quarantined, truncated, shrunk, token_efficiency, patch_efficiency and more (see
        `Planner.counters`).
      waited: seconds that `next` has waited for a batch; when it grows with the steps, data is what holds them up.
    """

    def __init__(
        self,
        planner: Planner,
        encoder: RecordEncoder,
        decoder: InlineDecoder | PoolDecoder,
        quarantine: Quarantine,
        *,
        rows: slice,
        collate_rows: Callable[..., PackedBatch],
        identity: dict[str, Any],
        prefetch: int,
    ):
        """rows: this process's rows of each planned batch. identity: a saved state with another one is not restored."""
        self._planner = planner
        self._encoder = encoder
        self._decoder = decoder
        self._quarantine = quarantine
        self._own = rows
        self._collate = collate_rows
        self._identity = identity
        self._prefetch = prefetch
        self.waited = 0.0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=self._prefetch)
        self._state, self.counters = self._snapshot(planner.state(), planner.counters())

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        """The next batch. Raises UserError when the data cannot go on (see `Quarantine`)."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._produce, args=(self._queue, self._stop), name="mindvl-data", daemon=True
            )
            self._thread.start()
        start = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=SIGN_OF_LIFE)
                break
            except queue.Empty:
                log.warning("waiting for a batch of data for %.0f s", time.perf_counter() - start)
        self.waited += time.perf_counter() - start
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
                if key == "tokenizer":
                    raise UserError(
                        "the checkpoint was trained with another tokenizer (vocabulary, id table or chat "
                        "template): its tokens would mean other words; set tokenizer back, or set run.resume "
                        "to `never`"
                    )
                raise UserError(
                    f"the checkpoint's data state has {key} {state.get(key)!r}, this run has {here!r}; "
                    "resume with the configuration of the checkpoint, or set run.resume to `never`"
                )
        self._halt()
        self._planner.restore(state["planner"])
        self._quarantine.restore("decode", state["decoding"])
        self._stop = threading.Event()
        self._queue = queue.Queue(maxsize=self._prefetch)
        self._state, self.counters = self._snapshot(self._planner.state(), self._planner.counters())

    def close(self) -> None:
        """Stop preparing batches and end the decoding processes."""
        self._halt()
        self._stop.set()
        self._encoder.close()
        self._decoder.close()

    # --- background ---

    def _snapshot(self, planned: dict[str, Any], counters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return state and counters of a batch: the planner's at planning time, the decoder's at decoding time."""
        decoding = self._quarantine.state("decode")
        reasons = collections.Counter(planned["quarantine"]["reasons"]) + collections.Counter(decoding["reasons"])
        counted = {**counters, "quarantined": sum(reasons.values()), "quarantined_by_reason": dict(reasons)}
        return {**self._identity, "planner": planned, "decoding": decoding}, counted

    def _halt(self) -> None:
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)  # a producer that waits for room must be able to end
        self._thread = None

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        under_way: collections.deque[tuple[Any, list, dict[str, Any], dict[str, Any]]] = collections.deque()
        failure: BaseException | None = None
        try:
            while not stop.is_set():
                while failure is None and len(under_way) < self._decoder.depth:
                    try:
                        rows, lost = self._planner.next_rows()[self._own], []
                        if isinstance(self._encoder, IndexedEncoder):
                            rows, lost = self._encoder.own(rows)
                        under_way.append(
                            (self._decoder.begin(rows), lost, self._planner.state(), self._planner.counters())
                        )
                    except BaseException as error:  # comes after the batches that were planned before it
                        failure = error
                if not under_way:
                    ready.put(failure)
                    return
                started, lost, planned, counters = under_way.popleft()
                ready.put(_Ready(self._finish(started, lost), *self._snapshot(planned, counters)))
        except BaseException as error:  # handed to the consumer, who raises it where the run can end cleanly
            ready.put(error)

    def _finish(self, started: Any, lost: list[tuple[int, SampleError]]) -> PackedBatch:
        """Collect a batch's media.

        What does not decode leaves a gap in its row: other processes have planned with it too.
        """
        decoded = self._decoder.finish(started)
        for position, error in [*lost, *decoded.failures]:
            self._quarantine.refuse(
                id=str(error.sample_id), where=self._planner.where(position), error=error, stage="decode"
            )
        if any(decoded.rows):
            self._quarantine.decoded()
        for position, example in decoded.fresh:
            self._planner.remember(position, example)
        return self._collate(decoded.rows, media=decoded.media)
