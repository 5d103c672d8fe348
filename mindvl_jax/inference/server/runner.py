"""The thread that owns the engine. Coroutines submit, read pieces and abort; the thread never waits for any of them."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.buckets import Bucket
from mindvl_jax.inference.engine import Engine, Watcher
from mindvl_jax.inference.generator import Generator, Piece
from mindvl_jax.inference.grammar import Matcher
from mindvl_jax.inference.prompts import Prompt
from mindvl_jax.inference.request import Request
from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.metrics import Metrics

log = logging.getLogger("mindvl.server")
IDLE_SECONDS = 0.5  # how often an idle thread looks whether it shall end


@dataclasses.dataclass(eq=False)
class Ticket:
    """A submitted request.

    Attributes:
      pieces: what has been generated and not been read yet; an exception ends it.
      open: answers that have not ended. owner: the API key that it came with.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception]
    open: int
    arrived: float
    adapter: str | None = None
    owner: str | None = None
    first: float | None = None
    tokens: int = 0
    watchers: list[Watcher] = dataclasses.field(default_factory=list)

    def put(self, item: Piece | Exception) -> None:
        """Hand something to the coroutine, from any thread. A loop that has ended reads nothing more."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Runner:
    """Run one engine for many coroutines, and one more for each adapter beside the model.

    Args:
      generator: with a fixed context. adapters: generators of the same model with an adapter each, by the names that
        requests give; every one has slots and a cache of its own.
      sizes: at which prompts are read (see `sizes.prompt_sizes`).
      limit: most requests that wait or decode. chunk: tokens decoded between two looks at the queue.
      owners: number of API keys. Half of the places are open to all; the others are kept for each key alike.
    """

    def __init__(
        self,
        generator: Generator,
        metrics: Metrics,
        sizes: Sequence[tuple[Bucket, int]],
        *,
        limit: int,
        chunk: int,
        adapters: Mapping[str, Generator] | None = None,
        owners: int = 1,
    ):
        self.generators: dict[str | None, Generator] = {None: generator, **(adapters or {})}
        self.generator, self.metrics, self._sizes = generator, metrics, sizes
        self._limit, self._chunk, self._owners = limit, chunk, owners
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: set[Ticket] = set()
        self._engines: dict[str | None, Engine] = {
            name: generator.new_engine() for name, generator in self.generators.items()
        }
        self._encoders = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="mindvl-encode")
        self._thread = threading.Thread(target=self._run, name="mindvl-engine", daemon=True)
        self._ending = False
        self._accepting = True
        self._pace = collections.deque(maxlen=64)  # seconds of the newest requests, for Retry-After
        metrics.slots.set(generator.slots * len(self.generators))

    # --- for the operator ---

    def warm_up(self) -> Iterator[tuple[int, int, str]]:
        """Compile every program that requests can need. Yields (done, total, what) before each."""
        prompt = self.generator.encode(Request.from_prompt("hello"))
        for number, (name, engine) in enumerate(self._engines.items()):
            for done, total, what in engine.warm_up(prompt, self._sizes):
                all_done, everything = number * total + done, len(self._engines) * total
                yield all_done, everything, what if name is None else f"{name}: {what}"

    def start(self) -> None:
        self._thread.start()
        self.metrics.warmed_up()

    def close(self) -> None:
        """End the thread; requests under way get an error."""
        self._accepting, self._ending = False, True
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(HTTPError(503, "the server is shutting down"))
        self._encoders.shutdown(cancel_futures=True)

    @property
    def load(self) -> int:
        """Requests that wait or decode."""
        return len(self._tickets)

    @property
    def accepting(self) -> bool:
        return self._accepting

    @property
    def engine(self) -> Engine:
        """The engine of the model without adapters."""
        return self._engines[None]

    @property
    def busy(self) -> bool:
        return any(engine.busy for engine in self._engines.values())

    # --- for coroutines ---

    async def run_blocking(self, function: Callable, *arguments) -> Any:
        """Run something slow (decoding, fetching) on the encoders' threads."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, function, *arguments)

    async def submit(
        self,
        request: Request,
        prompt: Prompt,
        matchers: Sequence[Matcher] = (),
        adapter: str | None = None,
        *,
        owner: str | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Queue an encoded request for the model, or for the model with an adapter.

        Args:
          owner: API key. priority: among the requests of the key.

        Raises:
          HTTPError: 429 when too many wait, 503 when the server is shutting down, 400 when the prompt does not fit.
        """
        self.check_room(owner)
        try:
            self._engines[adapter].check(prompt)
        except UserError as error:
            raise HTTPError(400, str(error), code="context_length_exceeded", param="messages") from None
        ticket = Ticket(
            request, asyncio.get_running_loop(), asyncio.Queue(), request.sampling.n, time.monotonic(), adapter, owner
        )
        self._tickets.add(ticket)
        self._commands.put(lambda: self._begin(ticket, prompt, matchers, priority))
        return ticket

    def check_room(self, owner: str | None = None) -> None:
        """Refuse before a request's images are read. A key whose share is used up is refused while another's is not.

        Raises:
          HTTPError: as `submit`.
        """
        if not self._accepting:
            raise HTTPError(503, "the server is shutting down", retry_after=5)
        kept = self._limit // (2 * self._owners) if self._owners > 1 else 0  # places that each key has for itself
        held = collections.Counter(ticket.owner for ticket in self._tickets)
        shared = sum(max(0, count - kept) for count in held.values())
        if held[owner] >= kept and shared >= self._limit - self._owners * kept:
            self.metrics.requests.labels("refused").inc()
            raise HTTPError(
                429,
                f"{held.total()} requests wait already; ask again later",
                code="queue_full",
                retry_after=self._retry_after(),
            )

    async def read(self, ticket: Ticket, seconds: float) -> AsyncIterator[Piece]:
        """Pieces of all answers until the last has ended. Abort the ticket when the caller leaves early.

        Raises:
          HTTPError: 500 when the engine failed, 504 when the time is up.
        """
        deadline = time.monotonic() + seconds
        outcome = "aborted"
        try:
            while ticket.open:
                try:
                    piece = await asyncio.wait_for(ticket.pieces.get(), max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    outcome = "timeout"
                    raise HTTPError(504, f"the answer took longer than {seconds:g} seconds", code="timeout") from None
                if isinstance(piece, Exception):
                    outcome = "failed"
                    raise piece
                if piece.answer is not None:
                    ticket.open -= 1
                yield piece
            outcome = "done"
        finally:
            self._finish(ticket, outcome)

    def drop(self, ticket: Ticket) -> None:
        """Abort a ticket that nobody reads."""
        self._finish(ticket, "aborted")

    async def load_parameters(self, params) -> None:
        """Replace the weights between two steps.

        Raises:
          ValueError: another structure than the model's, or adapters stand beside it.
        """
        if len(self._engines) > 1:
            raise ValueError("weights with adapters beside them are not replaced; start the server again")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def replace() -> None:
            try:
                self.engine.load(params)
            except Exception as error:  # told to whoever asked; the old weights stay
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        self._commands.put(replace)
        await done

    # --- on the event loop ---

    def _finish(self, ticket: Ticket, outcome: str) -> None:
        if ticket not in self._tickets:
            return
        self._tickets.discard(ticket)
        self.metrics.requests.labels(outcome).inc()
        if outcome != "done":
            self._commands.put(lambda: self._engines[ticket.adapter].abort(ticket.watchers))
            return
        seconds = time.monotonic() - ticket.arrived
        self._pace.append(seconds)
        self.metrics.whole.observe(seconds)
        if ticket.first is not None and ticket.tokens > 1:
            self.metrics.between_tokens.observe((ticket.arrived + seconds - ticket.first) / (ticket.tokens - 1))

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free."""
        mean = sum(self._pace) / len(self._pace) if self._pace else 1.0
        return max(1, round(mean / max(1, self.generator.slots)))

    # --- on the engine's thread ---

    def _begin(self, ticket: Ticket, prompt: Prompt, matchers: Sequence[Matcher], priority: int) -> None:
        if ticket not in self._tickets:  # its client has left already
            return

        def emit(piece: Piece) -> None:
            if ticket.first is None:
                ticket.first = time.monotonic()
                self.metrics.first_token.observe(ticket.first - ticket.arrived)
            if piece.answer is not None and piece.answer.error:
                ticket.put(HTTPError(400, piece.answer.error, param="response_format"))
                return
            if piece.answer is not None:
                ticket.tokens += len(piece.answer.tokens)
                self.metrics.answer_tokens.inc(len(piece.answer.tokens))
                if piece.sample == 0:
                    self.metrics.prompt_tokens.inc(piece.answer.prompt_tokens)
            ticket.put(piece)

        try:
            ticket.watchers = self.generators[ticket.adapter].submit(
                self._engines[ticket.adapter],
                0,
                ticket.request,
                prompt,
                emit,
                matchers,
                owner=ticket.owner,
                priority=priority,
            )
        except UserError as error:
            ticket.put(HTTPError(400, str(error)))

    def _run(self) -> None:
        while not self._ending:
            try:
                self._step()
            except Exception:
                log.exception("the engine failed; its requests get an error and it is made anew")
                self.metrics.restarts.inc()
                for name, generator in self.generators.items():
                    params = self._engines[name].parameters
                    self._engines[name] = generator.new_engine()
                    self._engines[name].fix(self._sizes)
                    self._engines[name].load(params)
                self._fail_all(HTTPError(500, "the engine failed while it answered; ask again", code="engine_failed"))

    def _step(self) -> None:
        try:  # everything that has been asked for; an idle thread waits for the next
            command = self._commands.get(timeout=None if self.busy else IDLE_SECONDS, block=not self.busy)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            pass
        for engine in self._engines.values():
            if engine.busy:
                engine.step(chunk=self._chunk, eager=True)
        self.metrics.reused_tokens.set(sum(engine.reused_tokens for engine in self._engines.values()))
        self.metrics.reused_pictures.set(sum(engine.reused_pictures for engine in self._engines.values()))
        self.metrics.waiting.set(sum(engine.waiting for engine in self._engines.values()))
        self.metrics.running.set(sum(engine.running for engine in self._engines.values()))

    def _fail_all(self, error: HTTPError) -> None:
        for ticket in list(self._tickets):
            ticket.put(error)
