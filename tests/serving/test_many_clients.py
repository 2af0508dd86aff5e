"""Many clients, and many requests: minutes of a server under load, all on this machine."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import NAME, Served, serving
from test_same_as_offline import offline

pytestmark = pytest.mark.slow

CLIENTS = 200
REQUESTS = 10_000
AT_ONCE = 32


def settled(server: Served) -> bool:
    return (
        server.metric("vllm:num_requests_running") == 0
        and server.metric("vllm:num_requests_waiting") == 0
        and server.metric("vllm:kv_cache_usage_perc") == 0
    )


def memory(server: Served) -> int:
    """Return the bytes that are the server's own."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


async def stream(client: httpx2.AsyncClient, body: dict[str, Any], most: int = 1 << 30) -> str:
    """Return a stream's text, or the first events of it."""
    made = ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                made += json.loads(line[6:])["choices"][0]["text"]
                most -= 1
            if most == 0:
                break
    return made


def with_client(server: Served, work: Callable[[httpx2.AsyncClient], Any]) -> Any:
    async def run() -> Any:
        limits = httpx2.Limits(max_connections=CLIENTS)
        async with httpx2.AsyncClient(base_url=server.url, limits=limits, timeout=300) as client:
            return await work(client)

    return asyncio.run(run())


def test_many_streams_at_once(checkpoint: Path, model: Any) -> None:
    """Of few pages, so that some are preempted; a third of the clients vanish."""
    prompts = [f"{'Once upon a time. ' * (i % 12)}{i}" for i in range(CLIENTS)]
    bodies = [
        {"model": NAME, "prompt": prompt, "max_tokens": 100, "seed": i}
        for i, prompt in enumerate(prompts)
    ]
    expected = [
        offline(model, prompt, new=100, temperature=1.0, seed=i)[0]
        for i, prompt in enumerate(prompts)
    ]

    async def ask_all(client: httpx2.AsyncClient) -> list[str]:
        most = [5 if i % 3 == 0 else 1 << 30 for i in range(CLIENTS)]
        return await asyncio.gather(
            *(stream(client, body, count) for body, count in zip(bodies, most, strict=True))
        )

    # Some 60 pages, of which each needs up to 5.
    with serving(checkpoint, "--kv-cache-gb", 0.0015, "--rows", 128) as server:
        made = with_client(server, ask_all)
        for i, (text, whole) in enumerate(zip(made, expected, strict=True)):
            assert text == whole if i % 3 else whole.startswith(text)
        assert settled(server)
        print(
            f"{CLIENTS} streams: {server.metric('vllm:num_preemptions_total'):.0f} preemptions, "
            f"{server.metric('vllm:prefix_cache_hits_total'):.0f} tokens found in pages"
        )
        assert server.stop() == 0


def test_memory_stays_flat(checkpoint: Path) -> None:
    """Ten thousand requests of all kinds; a tenth are wrong, a tenth are left."""
    chance = random.Random(0)

    async def ask(client: httpx2.AsyncClient, i: int) -> None:
        kind = i % 10
        body = {"model": NAME, "prompt": "x" * chance.randrange(1, 200), "max_tokens": 4}
        if kind == 0:
            answer = await client.post("/v1/completions", json=body | {"tools": []})
            assert answer.status_code == 400
        elif kind == 1:
            await stream(client, body | {"max_tokens": 50}, most=2)
        elif kind == 2:
            chat = {"model": NAME, "messages": [{"role": "user", "content": str(i)}]}
            answer = await client.post("/v1/chat/completions", json=chat | {"max_tokens": 4})
            assert answer.status_code == 200
        elif kind == 3:
            await stream(client, body | {"n": 2, "logprobs": 2})
        else:
            answer = await client.post("/v1/completions", json=body | {"stop": ["a", "bc"]})
            assert answer.status_code == 200

    async def ask_all(client: httpx2.AsyncClient, server: Served) -> list[int]:
        found = []
        for begin in range(0, REQUESTS, 1000):
            numbers = iter(range(begin, begin + 1000))

            async def some(numbers: Any) -> None:
                for i in numbers:
                    await ask(client, i)

            await asyncio.gather(*(some(numbers) for _ in range(AT_ONCE)))
            found.append(memory(server))
        return found

    # A cache of few pages, all of them soon written.
    with serving(checkpoint, "--kv-cache-gb", 0.005) as server:
        found = with_client(server, lambda client: ask_all(client, server))
        print("MB after each 1,000 requests:", [round(value / 1e6, 1) for value in found])
        assert settled(server)
        assert server.stop() == 0
    # The first thousands fill the allocator's arenas.
    assert found[-1] - found[2] < 8e6
