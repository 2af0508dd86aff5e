"""What the engine's thread does when a step is slow or fails, with a stand-in for the scheduler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx2
import pytest
from byte_models import byte_tokenizer
from test_refusals import error_of

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.requests import Request, Statistics, Token
from sq_cpu.serving import app
from sq_cpu.serving.engine import Engine
from sq_cpu.serving.prompts import Prompts
from sq_cpu.serving.service import Limits, Service

_Result = TypeVar("_Result")


class StandIn:
    """A scheduler whose requests get the letters of the alphabet, a letter a step.

    Attributes
    ----------
    gate : a step waits for it
    pause : seconds that a step takes
    fails_at : the step that raises
    bad : the number of a request that gets an error in place of its second token
    """

    pages, pages_used = 100, 0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.pause = 0.0
        self.fails_at = -1
        self.bad = -1
        self.steps = self.added = 0
        self.requests: dict[int, list[Any]] = {}
        self.threads: set[str] = set()
        self.statistics = Statistics()

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    @property
    def running(self) -> int:
        return len(self.requests)

    waiting = 0

    def add(self, request: Request) -> int:
        self.threads.add(threading.current_thread().name)
        if 258 in request.prompt:
            raise SqCpuError("no such prompt")
        self.added += 1
        self.requests[self.added] = [request, 0]
        return self.added

    def cancel(self, number: int) -> None:
        del self.requests[number]

    def step(self) -> list[Token]:
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        time.sleep(self.pause)
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("the memory\nis on fire")
        made = []
        for number, state in [*self.requests.items()]:
            state[1] += 1
            (letter,) = byte_tokenizer().convert_tokens_to_ids([chr(ord("a") + state[1] % 26)])
            finish: Any = "length" if state[1] == state[0].max_new_tokens else None
            if number == self.bad and state[1] == 2:
                finish, letter = "error", -1
            if finish:
                del self.requests[number]
            made.append(Token(number, letter, None, (), finish))
        return made


def with_client(
    work: Callable[[httpx2.AsyncClient, Service, StandIn], Awaitable[_Result]], **limits: int
) -> _Result:
    """Run some work against an application in this process."""

    async def all_of_it() -> _Result:
        scheduler: Any = StandIn()
        engine = Engine(lambda: scheduler)
        engine.attach()
        prompts = Prompts(byte_tokenizer(), None)  # type: ignore[arg-type]
        given = {"sequences": 4, "queue": 2, "positions": 1000, "vocabulary": 259} | limits
        service = Service("m", engine, prompts, byte_tokenizer(), [2], Limits(**given))
        transport = httpx2.ASGITransport(app.make_app(service, None))
        try:
            async with httpx2.AsyncClient(transport=transport, base_url="http://m") as client:
                return await asyncio.wait_for(work(client, service, scheduler), 30)
        finally:
            scheduler.gate.set()
            engine.stop()
            prompts.close()

    return asyncio.run(all_of_it())


def ask(client: httpx2.AsyncClient, **more: Any) -> asyncio.Task[httpx2.Response]:
    body = {"model": "m", "prompt": [5], "max_tokens": 6} | more
    return asyncio.ensure_future(client.post("/v1/completions", json=body))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_one_thread_alone_calls_the_scheduler() -> None:
    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        answers = await asyncio.gather(ask(client), ask(client, n=2), ask(client, prompt="text"))
        assert [a.json()["choices"][0]["text"] for a in answers] == ["bcdefg"] * 3
        assert scheduler.threads == {"sq_cpu engine"}

    with_client(work)


def test_a_step_that_fails() -> None:
    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        failures: list[int] = []
        service.engine.on_failure = lambda: failures.append(1)
        scheduler.fails_at, scheduler.pause = 3, 0.1
        stream, whole = await asyncio.gather(ask(client, stream=True), ask(client))
        events = [line[6:] for line in stream.text.split("\n\n") if line]
        assert stream.status_code == 200
        assert "[DONE]" not in events
        assert "the memory" in json.loads(events[-1])["error"]["message"]
        assert "the memory" in error_of(whole, 500)["message"]
        assert failures == [1]
        error_of(await ask(client), 503)
        error_of(await client.get("/ready"), 503)
        assert (await client.get("/health")).status_code == 200
        assert not service.engine.alive

    with_client(work)


def test_a_request_that_fails_alone() -> None:
    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        scheduler.bad = 1
        bad, good = await asyncio.gather(ask(client), ask(client))
        assert "not finite" in error_of(bad, 500)["message"]
        assert good.json()["choices"][0]["text"] == "bcdefg"
        error_of(await ask(client, prompt=[258]), 400)
        assert (await client.get("/ready")).status_code == 200

    with_client(work)


def test_slow_steps_and_a_full_queue() -> None:
    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        error_of(await ask(client, n=7), 400)
        scheduler.gate.clear()
        first = [ask(client, n=2), ask(client), ask(client, prompt=[[5], [6]]), ask(client)]
        await until(lambda: service._taken == 6)
        begin = time.monotonic()
        refused = await ask(client)
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        assert (await client.get("/health")).status_code == 200
        assert time.monotonic() - begin < 5
        scheduler.gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*first)} == {200}
        assert (await ask(client, n=6)).status_code == 200

    with_client(work)


def test_steps_that_came_together_are_sent_together() -> None:
    """A client that reads slowly costs no event a step."""

    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        answer = ask(client, max_tokens=20, n=2, stream=True)
        await until(lambda: scheduler.steps > 0)
        time.sleep(0.3)  # the event loop is busy while the steps go on
        lines = [line for line in (await answer).text.split("\n\n") if line]
        texts = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
        for index in (0, 1):
            made = "".join(each["text"] for each in texts if each["index"] == index)
            assert made == "bcdefghijklmnopqrstu"

    with_client(work)


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps neither its place nor the server from draining."""
    monkeypatch.setattr(app, "_PATIENCE", 0.05)
    body = json.dumps({"model": "m", "prompt": [5], "max_tokens": 900, "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1"}

    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            return next(received, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scheduler.pause = 0.01
        await app.make_app(service, None)(scope, receive, send)
        await service.drain()
        await until(lambda: not scheduler.busy)
        assert scheduler.steps < 500

    with_client(work)


def test_draining_waits_for_what_was_taken() -> None:
    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        scheduler.gate.clear()
        answer = ask(client)
        await until(lambda: scheduler.running == 1)
        drained = asyncio.ensure_future(service.drain())
        await asyncio.sleep(0.01)
        assert not drained.done()
        error_of(await ask(client), 503)
        error_of(await client.get("/ready"), 503)
        scheduler.gate.set()
        assert (await answer).json()["choices"][0]["text"] == "bcdefg"
        await drained

    with_client(work)


def test_a_scheduler_that_is_not_built() -> None:
    def build() -> Any:
        raise SqCpuError("no program")

    with pytest.raises(SqCpuError, match="no program"):
        Engine(build)


def test_interrupted_while_it_is_built() -> None:
    """The thread ends first: Python must not end while it is in native code."""

    def build() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return StandIn()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup's is to ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            Engine(build)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "sq_cpu engine" not in [thread.name for thread in threading.enumerate()]


def test_metrics_have_the_names_of_vllm() -> None:
    names = {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total"),
        *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
        *("e2e_request_latency_seconds_count",),
    }

    async def work(client: httpx2.AsyncClient, service: Service, scheduler: StandIn) -> None:
        await ask(client, n=2)
        text = (await client.get("/metrics")).text
        found = {line.partition("{")[0] for line in text.splitlines() if line[0] != "#"}
        assert {f"vllm:{name}" for name in names} <= found
        assert 'vllm:time_to_first_token_seconds_count{model_name="m"} 2.0' in text
        assert 'vllm:inter_token_latency_seconds_count{model_name="m"} 10.0' in text
        ended = 'vllm:request_success_total{finished_reason="length",model_name="m"} 2.0'
        assert ended in text

    with_client(work)
