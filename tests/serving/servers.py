"""Servers of a tiny model, in processes of their own, and what they should answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from byte_models import byte_model, byte_tokenizer

import sq_cpu

NAME = "tiny"
_COMMAND = "from sq_cpu_command import main; main()"
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_int8(folder: Path) -> Path:
    """Save a model of bytes with all linears and its head in int8, and a chat template."""
    model = sq_cpu.quantize(byte_model(), smooth=False, head="int8")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    return sq_cpu.save(model, folder, tokenizer)


@dataclass
class Served:
    """A server that has started."""

    process: subprocess.Popen[str]
    url: str
    line: str
    """What it said when clients could connect."""
    said: list[str] = field(default_factory=list)
    """Its lines on stderr since."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        options = {"timeout": 60} | options
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        if isinstance(body, bytes):
            options.setdefault("headers", {"Content-Type": "application/json"})
        return httpx2.post(self.url + path, **content, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value, summed over the labels that are not given."""
        total, found = 0.0, False
        for line in self.get("/metrics").text.splitlines():
            given, _, value = line.rpartition(" ")
            if given.partition("{")[0] == name and all(
                f'{key}="{text}"' in given for key, text in labels.items()
            ):
                total, found = total + float(value), True
        assert found, name
        return total

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signum)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, *options: object, key: str | None = None) -> Iterator[Served]:
    """Start `sq-cpu serve` at a free port; it is killed in the end."""
    environment = {k: v for k, v in os.environ.items() if k != "SQ_CPU_API_KEY"}
    if key is not None:
        environment["SQ_CPU_API_KEY"] = key
    defaults = ("--port", 0, "--model-name", NAME, "--threads", 1)
    given = [str(option) for option in (*defaults, *options)]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _COMMAND, "serve", str(folder), *given],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line.rstrip("\n"))
            found = re.match(r"serving .* at (http://\S+)/v1: ", line)
            if found:
                break
        else:
            raise AssertionError(f"the server ended: {said}")
        served = Served(process, found[1], said[-1])
        reading = threading.Thread(target=lambda: served.said.extend(process.stderr), daemon=True)
        reading.start()
        yield served
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
