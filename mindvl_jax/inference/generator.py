"""`Generator`: requests with text and images in, answers out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.buckets import next_size
from mindvl_jax.inference.engine import Delivery, Engine, Watcher
from mindvl_jax.inference.grammar import GrammarReader, Matcher
from mindvl_jax.inference.placement import mesh_of
from mindvl_jax.inference.prompts import Prompt, PromptEncoder
from mindvl_jax.inference.request import Answer, Request
from mindvl_jax.inference.text_stream import TextStream

GRAMMAR_FAILED = "the answer's grammar grew beyond what the reader of grammars can hold; use a simpler one"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Newly released text of an answer.

    Attributes:
      request: index of the request. sample: which of its answers. text: may be empty. answer: set once the answer is
        complete.
      tokens, logprobs, alternatives: since the last piece (see `Answer`); the text of the newest may still be withheld.
    """

    request: int
    sample: int
    text: str
    answer: Answer | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


class Generator:
    """Answer requests with one model.

    Args:
      opened: anything with `model`, `tokenizer`, `min_pixels` and `max_pixels` (such as `weights.open_model` returns).
      slots: answers that decode together.
      context: longest prompt plus answer in tokens; None sizes it by the requests, and grows for longer ones.
      mesh: devices to spread the slots over; None: the devices of the model's parameters.
      programs: back end; None is XLA, `backends.BridgePrograms(device)` is npu_bridge, the module `speculative` is
        XLA with tokens drafted ahead.
      prefix_bytes, prefill_chunk: see `Engine`.
    """

    def __init__(
        self,
        opened,
        *,
        slots: int = 16,
        context: int | None = None,
        mesh=None,
        programs=None,
        prefix_bytes: int = 0,
        prefill_chunk: int = 0,
        resample: str = "bicubic",
        video_fps: float = 2.0,
        video_max_frames: int = 64,
    ):
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.slots, self._fixed_context, self._mesh = slots, context, mesh or mesh_of(self.model)
        self.encode = PromptEncoder(
            self.model,
            self.tokenizer,
            min_pixels=opened.min_pixels,
            max_pixels=opened.max_pixels,
            resample=resample,
            video_fps=video_fps,
            video_max_frames=video_max_frames,
        )
        self._engine: Engine | None = None
        self._options = {"prefix_bytes": prefix_bytes, "prefill_chunk": prefill_chunk} | (
            {} if programs is None else {"programs": programs}
        )
        self.eos_ids = self.tokenizer.stop_ids
        self.grammars = GrammarReader(self.tokenizer, self.model.language.config.vocab_size, self.eos_ids)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_answer: Callable[[int, Answer], None] | None = None,
        skip_errors: bool = False,
    ) -> list[Answer]:
        """All answers, in the order of the requests (a request with n > 1 has n in a row).

        Args:
          on_answer: called with the request's index and each answer as soon as it is complete.
          skip_errors: a request that cannot be used gets an empty answer with `finish` "error" instead of ending the
            call.

        Raises:
          UserError: a request that cannot be used; the message names its id.
        """
        answers: dict[tuple[int, int], Answer] = {}
        for piece in self._run(requests, chunk=None, skip_errors=skip_errors):
            if piece.answer is not None:
                answers[piece.request, piece.sample] = piece.answer
                if on_answer is not None:
                    on_answer(piece.request, piece.answer)
        return [answers[key] for key in sorted(answers)]

    def stream(self, requests: Sequence[Request], *, chunk: int = 1) -> Iterator[Piece]:
        """Pieces of text as they are generated, `chunk` tokens at a time; the last piece of an answer carries the
        whole.
        """
        return self._run(requests, chunk=chunk)

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens that speculative decoding drafted ahead since the engine was made, and how many were accepted."""
        return (0, 0) if self._engine is None else self._engine.drafts

    def _run(self, requests: Sequence[Request], chunk: int | None, skip_errors: bool = False) -> Iterator[Piece]:
        requests = list(requests)
        # Windows bound the memory of waiting pixels. Inside a window prompts are sorted by length, the longest first.
        window = len(requests) if chunk is not None else max(1024, 16 * self.slots)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for start in range(0, len(requests), window):
                part = requests[start : start + window]
                prompts = list(pool.map(self._encode_or_error if skip_errors else self.encode, part))
                pieces: list[Piece] = []
                usable = []
                for index, prompt in enumerate(prompts):
                    if isinstance(prompt, Prompt):
                        usable.append(index)
                        continue
                    for sample in range(part[index].sampling.n):
                        failed = Answer(
                            id=part[index].id,
                            sample=sample,
                            text="",
                            tokens=(),
                            logprobs=(),
                            finish="error",
                            prompt_tokens=0,
                            error=str(prompt),
                        )
                        pieces.append(Piece(start + index, sample, "", failed))
                if chunk is None:
                    usable.sort(
                        key=lambda index: (prompts[index].bucket, part[index].sampling.max_new_tokens), reverse=True
                    )
                engine = self._engine_for([prompts[index] for index in usable], [part[index] for index in usable])
                for index in usable:
                    self.submit(engine, start + index, part[index], prompts[index], pieces.append)
                yield from pieces
                pieces.clear()
                while engine.busy:
                    engine.step(**({} if chunk is None else {"chunk": chunk}), eager=chunk is not None)
                    yield from pieces
                    pieces.clear()

    def _encode_or_error(self, request: Request) -> Prompt | UserError:
        try:
            return self.encode(request)
        except UserError as error:
            return error

    def _engine_for(self, prompts: Sequence[Prompt], requests: Sequence[Request]) -> Engine:
        needed = max(
            (prompt.tokens + request.sampling.max_new_tokens - 1 for prompt, request in zip(prompts, requests)),
            default=1,
        )
        context = self._fixed_context or next_size(needed, 64, halves=True)
        if self._engine is None or (self._fixed_context is None and self._engine.context < context):
            self._engine = self.new_engine(context)
        return self._engine

    def new_engine(self, context: int | None = None) -> Engine:
        """An engine of this generator's slots, for callers that drive it themselves.

        Args:
          context: None is the context that the generator was given, which must not be None then.
        """
        size = context or self._fixed_context
        return Engine(
            self.model, eos_ids=self.eos_ids, slots=self.slots, context=size, mesh=self._mesh, **self._options
        )

    def submit(
        self,
        engine: Engine,
        number: int,
        request: Request,
        prompt: Prompt,
        emit: Callable[[Piece], None],
        matchers: Sequence[Matcher] | None = None,
        *,
        owner: str | None = None,
        priority: int = 0,
    ) -> list[Watcher]:
        """Queue a request; `emit` gets its pieces on the thread that steps the engine.

        Returns what `Engine.abort` takes.

        Args:
          matchers: of the request's grammar, where the caller made them (`matchers`).
          owner, priority: as `Engine.submit`.

        Raises:
          UserError: the prompt does not fit the context; the grammar is not valid.
        """
        sampling = request.sampling
        if matchers is None:
            matchers = self.matchers(request)
        base = number if sampling.seed is None else sampling.seed
        watchers = [self._watcher(number, sample, request, prompt, emit) for sample in range(sampling.n)]
        engine.submit(
            prompt,
            sampling,
            seeds=[base + (sample << 32) for sample in range(sampling.n)],
            watchers=watchers,
            matchers=matchers,
            owner=owner,
            priority=priority,
        )
        return watchers

    def matchers(self, request: Request) -> list[Matcher]:
        """One for each answer of a request with a grammar, else none. Takes time, and is safe on any thread.

        Raises:
          UserError: the grammar is not valid, or the answers could not end (`ignore_eos`).
        """
        if request.grammar is None:
            return []
        if request.sampling.ignore_eos:
            raise UserError("an answer that matches a grammar ends with it, so ignore_eos must be false")
        return [self.grammars.matcher(request.grammar) for _ in range(request.sampling.n)]

    def _watcher(
        self, number: int, sample: int, request: Request, prompt: Prompt, emit: Callable[[Piece], None]
    ) -> Watcher:
        stream = TextStream(self.tokenizer, request.sampling.stop)
        logprobs: list[float] = []
        alternatives: list[tuple] = []
        told = 0

        def news(count: int) -> dict:
            nonlocal told
            since, told = slice(told, count), count
            return dict(
                tokens=tuple(stream.tokens[since]),
                logprobs=tuple(logprobs[since]),
                alternatives=tuple(alternatives[since]),
            )

        def watch(new: Delivery) -> bool:
            ended = new.ended
            text = stream.push(new.tokens, last=ended is not None)
            logprobs.extend(new.logprobs)
            alternatives.extend(new.alternatives)
            if not (ended or stream.stopped):
                if text:
                    emit(Piece(number, sample, text, **news(len(stream.tokens))))
                return False
            count = len(stream.tokens)
            answer = Answer(
                id=request.id,
                sample=sample,
                text=stream.text,
                tokens=tuple(stream.tokens),
                logprobs=tuple(logprobs[:count]),
                finish="stop" if stream.stopped else ended,
                error=GRAMMAR_FAILED if ended == "error" and not stream.stopped else None,
                prompt_tokens=prompt.tokens,
                alternatives=tuple(alternatives[:count]),
            )
            emit(Piece(number, sample, text, answer, **news(count)))
            return stream.stopped

        return watch
