"""How a server begins and ends: keys, ports, signals, a kill."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import error_of, run
from servers import NAME, Served, serving
from tiny import batches

import sq_cpu

LONG = {"model": NAME, "prompt": "a", "max_tokens": 900, "seed": 1, "stream": True}
LONG |= {"logit_bias": {"2": -100}}


def collect(url: str, texts: list[str], body: dict[str, Any] = LONG) -> threading.Thread:
    """Read a stream's lines in a thread, which has begun when this returns."""
    begun = threading.Event()

    def read() -> None:
        with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                texts.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    return thread


def test_a_signal_drains(checkpoint: Path) -> None:
    with serving(checkpoint) as served:
        whole: list[str] = []
        collect(served.url, whole).join()
        texts: list[str] = []
        thread = collect(served.url, texts)
        served.process.send_signal(signal.SIGTERM)
        while served.get("/ready").status_code == 200:
            time.sleep(0.01)
        refused = served.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert served.get("/health").status_code == 200
        thread.join()
        assert served.process.wait(30) == 0

    def made(lines: list[str]) -> list[Any]:
        parts = [json.loads(line[6:]) for line in lines if line[6:] not in ("", "[DONE]")]
        return [part["choices"][0]["text"] for part in parts]

    assert texts[-2:] == ["data: [DONE]", ""]
    assert "".join(made(texts)) == "".join(made(whole))


def test_a_second_signal_ends_it_at_once(checkpoint: Path) -> None:
    with serving(checkpoint) as served:
        body = LONG | {"n": 100}
        threads = [threading.Thread(target=_broken, args=(served.url, body)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while served.metric("vllm:generation_tokens_total") == 0:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGINT)
        while not any("shutting down" in line for line in served.said):
            time.sleep(0.01)
        begin = time.monotonic()
        assert served.stop() == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 5
        for thread in threads:
            thread.join()


def _broken(url: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx2.HTTPError):
        httpx2.post(url + "/v1/completions", json=body, timeout=60)


def test_killed_and_started_again_at_its_port_with_a_key(checkpoint: Path) -> None:
    host = "::1" if _has_ipv6() else "127.0.0.1"
    with serving(checkpoint, "--host", host) as served:
        assert "without a key" in served.line
        thread = threading.Thread(target=_broken, args=(served.url, LONG))
        thread.start()
        while served.metric("vllm:generation_tokens_total") == 0:
            time.sleep(0.01)
        served.process.kill()
        served.process.wait()
        thread.join()
        with serving(checkpoint, "--host", host, "--port", served.port, key="sécret") as again:
            assert again.url == served.url
            assert "with a key" in again.line
            taken = error_of("serve", checkpoint, "--host", host, "--port", again.port)
            assert f"port {again.port}" in taken
            assert "--port" in taken
            _check_key(again, "sécret")


def _check_key(served: Served, key: str) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": key}):
            headers = {name: value.encode() for name, value in given.items()}
            answer = served.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    right = {"Authorization": f"Bearer {key}".encode()}
    assert served.get("/v1/models", headers=right).status_code == 200
    assert served.get("/health").status_code == 200
    assert served.get("/ready").status_code == 200


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_what_does_not_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SQ_CPU_API_KEY", raising=False)
    assert "--without-key" in error_of("serve", checkpoint, "--host", "0.0.0.0")
    assert "no.such.host" in error_of(
        "serve", checkpoint, "--without-key", "--host", "no.such.host"
    )
    assert "sq-cpu quantize" in error_of("serve", save_float(tmp_path / "float"))
    assert "one page" in error_of("serve", checkpoint, "--port", 0, "--kv-cache-gb", 1e-6)
    monkeypatch.setenv("SQ_CPU_API_KEY", " ")
    assert "empty" in error_of("serve", checkpoint)


def test_a_model_that_cannot_be_fused(tmp_path: Path) -> None:
    model = byte_model()
    made = sq_cpu.quantize(model, sq_cpu.calibrate(model, batches()), scheme="O2")
    folder = sq_cpu.save(made, tmp_path / "int8", byte_tokenizer())
    assert "no program for llama" in error_of("serve", folder, "--port", 0)


def test_help() -> None:
    assert "SQ_CPU_API_KEY" in run("serve", "--help").stdout
