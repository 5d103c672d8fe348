"""Routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.generator import Piece
from mindvl_jax.inference.grammar import Matcher
from mindvl_jax.inference.request import Answer, Request
from mindvl_jax.inference.server import answers
from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.media import read_media
from mindvl_jax.inference.server.protocol import ChatBody, CompletionBody, parse
from mindvl_jax.inference.server.runner import Runner, Ticket
from mindvl_jax.inference.server.settings import ServerSettings
from mindvl_jax.inference.server.tools import ToolCallReader

PAGE = Path(__file__).with_name("page.html")


class Server:
    """The handlers, with what they share.

    Args:
      reload: reads the parameters of a folder of weights (`/admin/reload`); None: weights cannot be replaced.
    """

    def __init__(self, runner: Runner, settings: ServerSettings, *, reload: Callable[[str], Any] | None = None):
        self.runner, self.settings, self._reload = runner, settings, reload
        self._tokenizer = runner.generator.tokenizer
        self._context = runner.engine.context

    def app(self) -> Starlette:
        """The ASGI application; its end closes the runner."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette):
            self.runner.start()
            yield
            await asyncio.to_thread(self.runner.close)

        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/admin/reload", self._guarded(self._reload_weights), methods=["POST"]),
        ]
        handlers = {404: self._unknown_path, 405: self._wrong_method}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    # --- around every handler ---

    def _guarded(
        self, handler: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """Check the key; turn errors into answers of the OpenAI form."""

        async def guarded(request: HTTPRequest) -> Response:
            try:
                request.state.key = self._checked_key(request)
                return await handler(request)
            except HTTPError as error:
                return JSONResponse(error.body(), error.status, headers=error.headers())

        return guarded

    def _checked_key(self, request: HTTPRequest) -> str | None:
        """The API key of a request; None where none is asked for."""
        if not self.settings.api_keys:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        known = [
            hmac.compare_digest(given, accepted.encode()) for accepted in self.settings.api_keys
        ]  # all of them: equal time
        if scheme.lower() != "bearer" or not any(known):
            raise HTTPError(401, "this server wants an API key: Authorization: Bearer KEY", code="invalid_api_key")
        return key.strip()

    async def _json(self, request: HTTPRequest) -> Any:
        """The body, read piece by piece so that a large one is refused before it is held."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.settings.body_bytes:
                raise HTTPError(413, f"the body is larger than {self.settings.body_bytes} bytes", code="body_too_large")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise HTTPError(400, "the body is not JSON", code="invalid_json") from None

    async def _unknown_path(self, request: HTTPRequest, error: Exception) -> Response:
        return JSONResponse(
            HTTPError(404, f"there is no {request.url.path[:200]!r} here; see /v1/chat/completions").body(), 404
        )

    async def _wrong_method(self, request: HTTPRequest, error: Exception) -> Response:
        return JSONResponse(HTTPError(405, f"{request.url.path[:200]} does not take {request.method}").body(), 405)

    def _adapter(self, name: str) -> str | None:
        """The adapter that a request's model name means; None for the model itself."""
        if name == self.settings.model:
            return None
        if name in self.runner.generators:
            return name
        known = [self.settings.model, *filter(None, self.runner.generators)]
        raise HTTPError(
            404,
            f"there is no model {name[:200]!r}; this server has {', '.join(map(repr, known))}",
            code="model_not_found",
            param="model",
        )

    # --- small answers ---

    async def _page(self, request: HTTPRequest) -> Response:
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:"},
        )

    async def _health(self, request: HTTPRequest) -> Response:
        ready = self.runner.accepting
        return JSONResponse({"status": "ok" if ready else "shutting down"}, 200 if ready else 503)

    async def _metrics(self, request: HTTPRequest) -> Response:
        return Response(self.runner.metrics.text(), media_type="text/plain; version=0.0.4")

    def _card(self, adapter: str | None = None) -> dict:
        card = {"id": adapter or self.settings.model, "object": "model", "created": 0, "owned_by": "mindvl"}
        return card | {"max_model_len": self._context} | ({"parent": self.settings.model} if adapter else {})

    async def _models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.runner.generators]})

    async def _model(self, request: HTTPRequest) -> Response:
        return JSONResponse(self._card(self._adapter(request.path_params["name"])))

    async def _reload_weights(self, request: HTTPRequest) -> Response:
        content = await self._json(request)
        if self._reload is None:
            raise HTTPError(400, "this server cannot replace its weights")
        if not isinstance(content, dict) or not isinstance(content.get("weights"), str):
            raise HTTPError(400, 'the body must be {"weights": "FOLDER"}', param="weights")
        try:
            params = await self.runner.run_blocking(self._reload, content["weights"])
            await self.runner.load_parameters(params)
        except (UserError, ValueError) as error:
            raise HTTPError(400, str(error), param="weights") from None
        return JSONResponse({"status": "loaded", "weights": content["weights"]})

    # --- chat ---

    async def _chat(self, request: HTTPRequest) -> Response:
        body: ChatBody = parse(ChatBody, await self._json(request))
        adapter = self._adapter(body.model)
        self.runner.check_room(request.state.key)
        identifier = f"chatcmpl-{uuid.uuid4().hex}"
        asked, prompt, matchers = await self.runner.run_blocking(self._encode_chat, body, identifier)
        whose = dict(owner=request.state.key, priority=body.priority or 0)
        ticket = await self.runner.submit(asked, prompt, matchers, adapter, **whose)
        if body.stream:
            return self._stream(self._chat_events(ticket, body, identifier, prompt.tokens))
        done = await self._collect(request, ticket)
        choices = [
            answers.chat_choice(self._tokenizer, answer, logprobs=bool(body.logprobs), tools=body.calls_tools)
            for answer in done
        ]
        return JSONResponse(
            answers.envelope(
                identifier, "chat.completion", body.model, choices, usage=answers.usage(prompt.tokens, done)
            )
        )

    def _encode_chat(self, body: ChatBody, identifier: str):
        asked = body.request(
            identifier, self.settings, self._context, lambda url, param: read_media(url, self.settings, param)
        )
        return asked, self._encode(self.runner.generator.encode, asked), self._matchers(asked)

    def _matchers(self, asked: Request) -> list[Matcher]:
        try:
            return self.runner.generator.matchers(asked)
        except UserError as error:
            raise HTTPError(400, str(error), param="response_format") from None

    def _encode(self, encode: Callable[[Request], Any], asked: Request):
        try:
            return encode(asked)
        except UserError as error:
            raise HTTPError(400, str(error).removeprefix(f"request {asked.id}: "), param="messages") from None

    async def _collect(self, request: HTTPRequest, ticket: Ticket) -> list[Answer]:
        """All answers; a client that goes away frees its slots."""

        async def gather() -> list[Answer]:
            return [
                piece.answer
                async for piece in self.runner.read(ticket, self.settings.request_seconds)
                if piece.answer is not None
            ]

        async def leaving() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.1)

        work, gone = asyncio.ensure_future(gather()), asyncio.ensure_future(leaving())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPError(499, "the client went away")
            return sorted(work.result(), key=lambda answer: answer.sample)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _chat_events(
        self, ticket: Ticket, body: ChatBody, identifier: str, prompt_tokens: int
    ) -> AsyncIterator[dict]:
        started: set[int] = set()
        readers: dict[int, ToolCallReader] = {}
        done: list[Answer] = []
        null_usage = {"usage": None} if body.include_usage else {}

        def chunk(choice: dict | None, **rest) -> dict:
            return answers.envelope(identifier, "chat.completion.chunk", body.model, [choice] if choice else [], **rest)

        async for piece in self.runner.read(ticket, self.settings.request_seconds):
            if piece.sample not in started:
                started.add(piece.sample)
                yield chunk(answers.chat_delta(piece.sample, "", first=True), **null_usage)
            logprobs = None
            if body.logprobs and piece.tokens:
                logprobs = answers.chat_logprobs(self._tokenizer, piece)
            text, calls = piece.text, []
            if body.calls_tools:
                reader = readers.setdefault(piece.sample, ToolCallReader())
                text, calls = reader.push(piece.text, last=piece.answer is not None)
            if text or calls or logprobs:
                delta = answers.chat_delta(piece.sample, text, logprobs=logprobs, calls=calls)
                yield chunk(delta, **null_usage)
            if piece.answer is not None:
                done.append(piece.answer)
                called = piece.sample in readers and bool(readers[piece.sample].calls)
                finish = answers.finish_reason(piece.answer, called)
                yield chunk(answers.chat_delta(piece.sample, "", finish=finish), **null_usage)
        if body.include_usage:
            yield chunk(None, usage=answers.usage(prompt_tokens, done))

    def _stream(self, events: AsyncIterator[dict]) -> Response:
        async def lines() -> AsyncIterator[str]:
            try:
                async with contextlib.aclosing(
                    events
                ):  # a client that leaves closes the reader, which aborts the ticket
                    async for event in events:
                        yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            except HTTPError as error:  # the status is sent already: told as an event
                yield f"data: {json.dumps(error.body())}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(
            lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    # --- completions ---

    async def _completions(self, request: HTTPRequest) -> Response:
        body: CompletionBody = parse(CompletionBody, await self._json(request))
        adapter = self._adapter(body.model)
        self.runner.check_room(request.state.key)
        identifier = f"cmpl-{uuid.uuid4().hex}"
        sampling = body.sampling(self._context, self.settings.sampling)
        grammar = body.structured_outputs.said() if body.structured_outputs is not None else None
        if body.stream and len(body.prompts) > 1:
            raise HTTPError(400, "`prompt` can hold one text when stream is true", param="prompt")
        encoded = []
        for text in body.prompts:
            messages = [{"role": "user", "content": text}]
            asked = Request(messages=messages, sampling=sampling, grammar=grammar, id=identifier)
            matchers = await self.runner.run_blocking(self._matchers, asked)
            encoded.append(
                (
                    asked,
                    await self.runner.run_blocking(self._encode, self.runner.generator.encode.text, asked),
                    matchers,
                )
            )
        prompt_tokens = sum(prompt.tokens for _, prompt, _ in encoded)
        tickets: list[Ticket] = []
        whose = dict(owner=request.state.key, priority=body.priority or 0)
        try:
            for each in encoded:
                tickets.append(await self.runner.submit(*each, adapter, **whose))
        except HTTPError:  # nobody would read the answers of the prompts before
            for ticket in tickets:
                self.runner.drop(ticket)
            raise
        if body.stream:
            return self._stream(self._completion_events(tickets[0], body, identifier, prompt_tokens))
        choices, done = [], []
        for number, found in enumerate(await asyncio.gather(*(self._collect(request, ticket) for ticket in tickets))):
            for answer in found:
                done.append(answer)
                logprobs = answers.completion_logprobs(self._tokenizer, answer) if body.logprobs is not None else None
                index = number * sampling.n + answer.sample
                choices.append(
                    {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish}
                )
        return JSONResponse(
            answers.envelope(
                identifier, "text_completion", body.model, choices, usage=answers.usage(prompt_tokens, done)
            )
        )

    async def _completion_events(
        self, ticket: Ticket, body: CompletionBody, identifier: str, prompt_tokens: int
    ) -> AsyncIterator[dict]:
        done: list[Answer] = []
        read: dict[int, int] = {}  # characters of each answer's tokens so far

        def event(piece: Piece) -> dict:
            finish = None if piece.answer is None else piece.answer.finish
            logprobs = None
            if body.logprobs is not None and piece.tokens:
                logprobs = answers.completion_logprobs(self._tokenizer, piece, read.get(piece.sample, 0))
                read[piece.sample] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
            choice = {"index": piece.sample, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}
            return answers.envelope(identifier, "text_completion", body.model, [choice])

        async for piece in self.runner.read(ticket, self.settings.request_seconds):
            if piece.answer is not None:
                done.append(piece.answer)
            yield event(piece)
        if body.include_usage:
            yield answers.envelope(
                identifier, "text_completion", body.model, [], usage=answers.usage(prompt_tokens, done)
            )
