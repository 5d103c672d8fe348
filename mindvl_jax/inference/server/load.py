"""Put load on a server with the OpenAI interface and measure what its clients see."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import random
import time
from collections.abc import Callable

import httpx
import numpy as np
from PIL import Image

from mindvl_jax.core.errors import UserError

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked.

    Attributes:
      requests: how many. tokens: of each answer, to the last (`ignore_eos`).
      clients: closed loop: so many ask, each again as soon as it is answered. rate: open loop: requests a second at
        random moments (Poisson), however many are under way; one of the two is 0.
      words: of a prompt. shared_words: at its start, equal in all prompts. images: of a prompt, each of `image_size`
        pixels a side.
      seed: of words, images and moments.
    """

    requests: int
    tokens: int = 64
    clients: int = 8
    rate: float = 0.0
    words: int = 32
    shared_words: int = 0
    images: int = 0
    image_size: int = 224
    seed: int = 0

    def body(self, model: str, number: int) -> dict:
        """The request of this number; equal for an equal seed."""
        shared, own = random.Random(self.seed), random.Random(f"{self.seed} {number}")
        words = [_word(shared) for _ in range(self.shared_words)]
        words += [_word(own) for _ in range(self.words - self.shared_words)]
        content: list[dict] = [
            {"type": "image_url", "image_url": {"url": _image(self.image_size, [self.seed, number, place])}}
            for place in range(self.images)
        ]
        content.append({"type": "text", "text": " ".join(words)})
        return {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclasses.dataclass
class Seen:
    """One request as its client saw it, in seconds since the request was due.

    Attributes:
      first: until the first text. whole: until the end. tokens: of the answer. error: why there was none.
    """

    first: float = 0.0
    whole: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def between(self) -> float:
        """Mean time between tokens after the first."""
        return (self.whole - self.first) / max(1, self.tokens - 1)


def measure(url: str, load: Load, *, model: str | None, key: str | None, told: Callable[[int], None]) -> dict:
    """Run a load; returns its figures (see `figures`). `told` is called with the number of requests that have ended.

    Raises:
      UserError: the server cannot be reached, or answers no request.
    """
    return asyncio.run(_measure(url.rstrip("/"), load, model, key, told))


async def _measure(url: str, load: Load, model: str | None, key: str | None, told: Callable[[int], None]) -> dict:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        if model is None:
            try:
                listed = await client.get("/v1/models")
                model = listed.raise_for_status().json()["data"][0]["id"]
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                raise UserError(f"{url}/v1/models cannot be read ({error}); is a server running there?") from None
        bodies = [load.body(model, number) for number in range(load.requests)]
        seen: list[Seen] = []

        async def ask(body: dict, due: float) -> None:
            seen.append(await _ask(client, body, due))
            told(len(seen))

        start = time.monotonic()
        if load.rate:
            draw, due, tasks = random.Random(load.seed), start, []
            for body in bodies:
                due += draw.expovariate(load.rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.append(asyncio.create_task(ask(body, due)))
            await asyncio.gather(*tasks)
        else:
            left = iter(bodies)

            async def keep_asking() -> None:
                for body in left:
                    await ask(body, time.monotonic())

            await asyncio.gather(*(keep_asking() for _ in range(load.clients)))
        return figures(seen, time.monotonic() - start)


async def _ask(client: httpx.AsyncClient, body: dict, due: float) -> Seen:
    seen = Seen()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return Seen(error=f"status {answer.status_code}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Seen(error=str(event["error"].get("message"))[:200])
                if not seen.first and event["choices"] and event["choices"][0]["delta"].get("content"):
                    seen.first = time.monotonic() - due
                seen.tokens = (event.get("usage") or {}).get("completion_tokens", seen.tokens)
    except (httpx.HTTPError, ValueError) as error:
        return Seen(error=type(error).__name__)
    seen.whole = time.monotonic() - due
    seen.first = seen.first or seen.whole
    return seen


def figures(seen: list[Seen], seconds: float) -> dict:
    """Percentiles in seconds of `first_token`, `between_tokens` and `request`; throughput; errors by reason.

    Raises:
      UserError: no request was answered.
    """
    good = [one for one in seen if not one.error]
    errors: dict[str, int] = {}
    for one in seen:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    if not good:
        raise UserError(f"no request was answered: {errors}")
    columns = {
        "first_token": [one.first for one in good],
        "between_tokens": [one.between for one in good],
        "request": [one.whole for one in good],
    }
    return {
        "requests": len(seen),
        "errors": errors,
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": sum(one.tokens for one in good) / seconds,
        **{
            name: {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
            for name, values in columns.items()
        },
    }


def _word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8)))


def _image(size: int, seed: list[int]) -> str:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
