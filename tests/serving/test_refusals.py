"""What is wrong, or not supported: an error in OpenAI's shape, of one line, and never an answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from servers import NAME, Served

COMPLETION = {"model": NAME, "prompt": "a", "max_tokens": 1}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 500
    expected = "invalid_request_error" if status < 500 else "server_error"
    assert error["type"] == ("rate_limit_error" if status == 429 else expected)
    found: dict[str, Any] = error
    return found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [""]),
        ("prompt", [[]]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", [259]),
        ("prompt", [-1]),
        ("prompt", [1 << 70]),
        ("prompt", ["a", 1]),
        ("prompt", "\ud800"),
        ("prompt", "a" * 1024),
        ("max_tokens", 0),
        ("max_tokens", 1024),
        ("max_tokens", 10**30),
        ("max_tokens", "5"),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("n", 0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.5),
        ("seed", 1 << 63),
        ("seed", "1"),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"259": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", ["\udfff"]),
        ("stop", 5),
        ("stream", "true"),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("stream_options", {"other": True}),
        ("logprobs", 21),
        ("logprobs", True),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", SCHEMA),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "b"),
        ("store", True),
        ("service_tier", "flex"),
        ("metadata", {"a": 1}),
        ("tools", [TOOL]),
        ("nonsense", 1),
        ("\x1b[31m\ud800", 1),
        ("model", 5),
    ],
)
def test_a_field_of_completions(server: Served, field: str, value: Any) -> None:
    body = json.dumps(COMPLETION | {field: value}).encode()
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["param"] is None or error["param"].startswith(field)
    assert field in error["message"] or field in ("\x1b[31m\ud800", "prompt", "n", "max_tokens")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "a"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "tool", "content": "a", "tool_call_id": "1"}]),
        ("messages", [{"role": "assistant", "content": "a", "tool_calls": [TOOL]}]),
        ("messages", [{"role": "user", "content": "a" * 2000}]),
        ("max_completion_tokens", 5),
        ("top_logprobs", 2),
        ("logprobs", 1),
        ("tools", [TOOL]),
        ("tools", []),
        ("tool_choice", "auto"),
        ("functions", [TOOL]),
        ("function_call", "auto"),
        ("audio", {"voice": "a", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "a"}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("prompt", "a"),
    ],
)
def test_a_field_of_chats(server: Served, field: str, value: Any) -> None:
    error = error_of(server.post("/v1/chat/completions", CHAT | {field: value}), 400)
    assert error["message"].startswith((field, "max_tokens and", "the prompt", "2018 tokens"))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "temperature": NaN, "prompt": "a"}',
        b'{"model": "tiny", "temperature": 1e999, "prompt": "a"}',
    ],
)
def test_a_body_that_is_none(server: Served, path: str, body: bytes) -> None:
    error_of(server.post(path, body), 400)


def test_a_body_of_another_type(server: Served) -> None:
    body = json.dumps(COMPLETION).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.post("/v1/completions", body, headers={"Content-Type": kind})
        error_of(answer, 400)


def test_a_body_that_is_too_large(server: Served) -> None:
    error_of(server.post("/v1/completions", b"x" * (9 << 20)), 413)

    def parts() -> Iterator[bytes]:
        for _ in range(9):
            yield b"x" * (1 << 20)

    headers = {"Content-Type": "application/json"}
    answer = httpx2.post(server.url + "/v1/completions", content=parts(), headers=headers)
    error_of(answer, 413)


def test_a_length_that_is_a_lie(server: Served) -> None:
    """A client that promises a body and goes away."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
    assert server.get("/health").status_code == 200


def test_what_is_not_there(server: Served) -> None:
    error_of(server.get("/nothing"), 404)
    error_of(server.get("/docs"), 404)
    error_of(server.get("/v1/completions"), 405)
    error = error_of(server.post("/v1/completions", COMPLETION | {"model": "gpt-4o\n"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


def test_what_changes_no_answer_is_taken(server: Served) -> None:
    same = {"user": "a", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    same |= {"safety_identifier": "a", "prompt_cache_key": "a", "response_format": None}
    same |= {"stop": None, "seed": 1, "response_format": {"type": "text"}}
    own = {"best_of": None, "suffix": None, "echo": False}
    plain = server.post("/v1/completions", COMPLETION | {"seed": 1}).json()
    given = server.post("/v1/completions", COMPLETION | same | own).json()
    assert given["choices"] == plain["choices"]
    own = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True}
    own |= {"modalities": ["text"], "logprobs": False, "max_completion_tokens": 1}
    plain = server.post("/v1/chat/completions", CHAT | {"seed": 1}).json()
    given = server.post("/v1/chat/completions", CHAT | same | own).json()
    assert given["choices"] == plain["choices"]


def test_those_who_run_it_are_told(server: Served) -> None:
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [NAME]
