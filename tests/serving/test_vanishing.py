"""Clients that go away: what they asked for ends, and its pages are free."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from servers import NAME, Served

LONG: dict[str, Any] = {"model": NAME, "prompt": "a" * 100, "max_tokens": 900, "seed": 1}
LONG |= {"logit_bias": {"2": -100}}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def begin(server: Served, body: dict[str, Any]) -> socket.socket:
    text = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", server.port), 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n"
    client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
    return client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_all_choices_end(server: Served, n: int, stream: bool) -> None:
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    made = server.metric("vllm:generation_tokens_total")
    client = begin(server, LONG | {"n": n, "stream": stream})
    wait_until(lambda: server.metric("vllm:generation_tokens_total") > made)
    assert server.metric("vllm:num_requests_running") == n
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    client.close()
    wait_until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:generation_tokens_total") - made < n * 900
    ended = server.metric("vllm:request_success_total", finished_reason="abort")
    assert ended == aborted + n


def test_in_the_middle_of_anything(server: Served) -> None:
    """Thirty that go away after a moment each, streams and not."""
    for i in range(30):
        client = begin(server, LONG | {"n": 1 + i % 3, "stream": i % 2 == 0})
        time.sleep(0.002 * i)
        client.close()
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0)
    wait_until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    assert server.metric("vllm:num_requests_waiting") == 0


def test_one_that_does_not_read(server: Served) -> None:
    """It holds back nobody else."""
    with begin(server, LONG | {"stream": True, "n": 4}):
        body = {"model": NAME, "prompt": "b", "max_tokens": 8}
        for _ in range(3):
            assert httpx2.post(server.url + "/v1/completions", json=body).status_code == 200
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0)
