"""Hundreds of streams at once, of which some vanish and some send garbage. By hand: docs/serve.md says what it gave."""

import asyncio
import collections
import json
import os
import random
import time

import httpx
import psutil
import pytest

STREAMS = 500
SECONDS = float(os.environ.get("MINDVL_STRESS_SECONDS", 600))
GARBAGE = (b"{", b"[]", b'{"model": "tiny"}', b"\xff\xfe", b'{"model": "tiny", "messages": [{"role": "user"}]}')


async def _one(client: httpx.AsyncClient, draw: random.Random) -> str:
    """Ask once; how it ended."""
    kind = draw.random()
    if kind < 0.01:
        answer = await client.post("/v1/chat/completions", content=draw.choice(GARBAGE))
        assert answer.status_code == 400 and answer.json()["error"]["message"]
        return "refused"
    most = draw.randint(1, 24)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "w" * draw.randint(1, 60)}],
        "max_tokens": most,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": draw.randrange(1000),
    }
    usage, ended = None, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if kind > 0.98:
                return "vanished"
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                usage = event["usage"] or usage
            ended = ended or line == "data: [DONE]"
    assert ended and usage["completion_tokens"] == most
    return "done"


@pytest.mark.slow
def test_no_stream_is_lost_and_no_slot_leaks(opened, start):
    process, memory = psutil.Process(), []

    async def run(url: str) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        end = time.monotonic() + SECONDS
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:

            async def keep_asking(number: int) -> None:
                draw = random.Random(number)
                while time.monotonic() < end:
                    found[await _one(client, draw)] += 1

            async def watch_memory() -> None:
                while time.monotonic() < end:
                    memory.append(process.memory_info().rss)
                    await asyncio.sleep(SECONDS / 20)

            await asyncio.gather(watch_memory(), *map(keep_asking, range(STREAMS)))
        return found

    with start(opened, queue=2 * STREAMS) as server:
        found = asyncio.run(run(server.url))
        assert server.idle(), "a slot or a ticket leaked"
        compiled = server.runner.metrics.compilations_since_warm_up()
    middle, late = memory[len(memory) // 2], memory[-1]
    print(f"{dict(found)} in {SECONDS:g} s; memory {middle >> 20} MiB in the middle, {late >> 20} MiB at the end")
    assert found["done"] > STREAMS and found["vanished"] and found["refused"] and compiled == 0
    assert late < 1.1 * middle
