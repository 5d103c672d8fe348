"""Encoding and decoding in other processes. Media are written by them straight into the memory of the batch.

The batch's media lie in a memory file that the decoding processes map too: no pixel is copied or pickled on its way.
Order never depends on who was faster: results are taken in the order of the stream.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.encoding import DecodedRows, Planned, encode_record
from mindvl_jax.data.processor import Example, MakeProcessor, MediaArea, Processor
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.mixture import MixtureStream
from mindvl_jax.data.sources.readers import Source

CHUNK = 16  # records a task: enough to pay for the hand-over, few enough not to wait for
STANDSTILL = 600.0  # seconds without an answer: far above what the longest video takes
LEAVING = 20.0  # seconds for the processes to end their tasks when the loader closes
CHUNKS_AHEAD = 3  # chunks under way for each process


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of a worker process; pickled once to each."""

    config: Config
    phase_index: int
    make_processor: MakeProcessor


class _Worker:
    """State of a decoding process."""

    sources: list[Source]
    processor: Processor


def _start(job: Job, parent: int) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    names = job.config.training.phases[job.phase_index].sources
    _Worker.sources = [Source(name, job.config.data.sources[name]) for name in names]
    _Worker.processor = job.make_processor(job.config, job.phase_index)


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone, killed for instance: nobody would read the results."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _encode(references: Sequence[tuple[int, int]]) -> list[Example | SampleError]:
    worker = _Worker
    return [encode_record(worker.sources[source], index, worker.processor) for source, index in references]


def _fill(memory: str, offset: int, media: Sequence[Any]) -> list[SampleError | None]:
    area = _Worker.processor.media
    with open(memory, "r+b") as file:
        # Unmapped when the last array that looks into it is gone; closing it here would be too early for error
        # tracebacks.
        mapped = mmap.mmap(file.fileno(), 0)
    row = np.frombuffer(mapped, area.dtype, math.prod(area.shape), offset).reshape(area.shape)
    return _Worker.processor.fill(row, media)


class WorkerPool:
    """The processes, started when first needed."""

    def __init__(self, job: Job, count: int):
        self._job = job
        self.count = count
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def submit(self, function, *arguments) -> concurrent.futures.Future:
        if self._pool is None:
            # Fresh processes, not forks: a fork of a process with JAX's threads can stop for ever in a lock.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._job, os.getpid()),
            )
        try:
            return self._pool.submit(function, *arguments)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise self.broken() from error

    def result(self, task: concurrent.futures.Future) -> Any:
        """The result of a task.

        Raises:
          UserError: a process ended by itself, or gave nothing for `STANDSTILL` seconds; the processes are ended then.
        """
        try:
            return task.result(STANDSTILL)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise self.broken() from error
        except concurrent.futures.TimeoutError:
            self.kill()
            raise UserError(
                f"a decoding process (data.workers is {self.count}) gave no answer for {STANDSTILL:g} s: it "
                "was stopped, or waits for a file system that does not "
                "answer. Start the same command again when it does; data.workers 0 decodes in this process"
            ) from None

    def kill(self) -> None:
        """End the processes whatever they do: one that stands still would never leave by itself."""
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.kill()

    def broken(self) -> UserError:
        return UserError(
            f"a decoding process (data.workers is {self.count}) ended by itself. The machine may be out of "
            "memory: use fewer workers or a smaller "
            "data.packing_buffer; data.workers 0 decodes in this process and shows the error itself"
        )

    def close(self) -> None:
        if self._pool is not None:
            processes = list((getattr(self._pool, "_processes", None) or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            deadline = time.monotonic() + LEAVING
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                if process.is_alive():  # stopped, or waiting for a file system
                    process.kill()
            self._pool = None


class PoolEncoder:
    """Encode ahead of the stream in the pool, in chunks; answers in order of asking."""

    def __init__(self, stream: MixtureStream, pool: WorkerPool):
        self._stream = stream
        self._pool = pool
        self._chunks: dict[int, concurrent.futures.Future] = {}

    def encode(self, position: int) -> Example | SampleError:
        chunk = position // CHUNK
        for ahead in range(chunk, chunk + CHUNKS_AHEAD * self._pool.count + 1):
            if ahead not in self._chunks:
                references = [self._stream[p] for p in range(ahead * CHUNK, (ahead + 1) * CHUNK)]
                self._chunks[ahead] = self._pool.submit(
                    _encode, [(reference.source, reference.index) for reference in references]
                )
        for done in [known for known in self._chunks if known < chunk]:
            del self._chunks[done]
        return self._pool.result(self._chunks[chunk])[position % CHUNK]

    def encode_many(self, positions: Sequence[int]) -> list[Example | SampleError]:
        """Encode samples from anywhere in the stream, in the pool, and wait for them."""
        references = [self._stream[position] for position in positions]
        pairs = [(reference.source, reference.index) for reference in references]
        tasks = [self._pool.submit(_encode, pairs[start : start + CHUNK]) for start in range(0, len(pairs), CHUNK)]
        return [example for task in tasks for example in self._pool.result(task)]

    def close(self) -> None:
        self._chunks.clear()
        self._pool.close()


class PoolDecoder:
    """Decode the rows of a batch in the pool, into shared memory; several batches are under way at a time."""

    depth = 3

    def __init__(self, pool: WorkerPool, area: MediaArea, media_of: Callable[[Example], Any]):
        self._pool, self._area, self._media_of = pool, area, media_of

    def begin(self, rows: Sequence[Sequence[Planned]]) -> Any:
        row_bytes = math.prod(self._area.shape) * np.dtype(self._area.dtype).itemsize
        # Anonymous memory with a name for others: no file to leave behind, no limit of /dev/shm.
        handle = os.memfd_create("mindvl-batch")
        os.ftruncate(handle, max(1, len(rows) * row_bytes))
        memory = mmap.mmap(handle, 0)
        name = f"/proc/{os.getpid()}/fd/{handle}"
        tasks = []
        for index, row in enumerate(rows):
            media = [self._media_of(example) for _, example in row]
            tasks.append(self._pool.submit(_fill, name, index * row_bytes, media) if any(media) else None)
        return rows, handle, memory, tasks

    def finish(self, started: Any) -> DecodedRows:
        rows, handle, memory, tasks = started
        kept, failures = [], []
        try:
            for row, task in zip(rows, tasks, strict=True):
                errors = [None] * len(row) if task is None else self._pool.result(task)
                kept.append([example for (_, example), error in zip(row, errors, strict=True) if error is None])
                for (position, example), error in zip(row, errors, strict=True):
                    if error is not None:
                        error.sample_id = example.id
                        failures.append((position, error))
        finally:
            os.close(handle)  # the mapping lives on for as long as the array
        shape = (len(rows), *self._area.shape)
        return DecodedRows(
            kept, failures, media=np.frombuffer(memory, self._area.dtype, math.prod(shape)).reshape(shape)
        )

    def close(self) -> None:
        self._pool.close()
