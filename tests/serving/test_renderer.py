"""The process that renders chats: it outlives what templates do, and not the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_tokenizer

from sq_cpu.errors import SqCpuError
from sq_cpu.serving.renderer import Renderer

CHAT = [{"role": "user", "content": "é\n"}, {"role": "system", "content": "b"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.content }}>{% endfor %}"
)


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = Renderer(tokenizer)
    yield made
    made.close()


def test_chats(renderer: Renderer) -> None:
    assert renderer.render(CHAT[:1]) == "<é\n>"
    with pytest.raises(SqCpuError, match=r"no system.*use /v1/completions"):
        renderer.render(CHAT)
    assert renderer.render(CHAT[:1] * 50_000) == "<é\n>" * 50_000


def test_killed(renderer: Renderer) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):  # of a whole group: the server drains
        os.kill(renderer._child, signum)
    assert renderer.render(CHAT[:1]) == "<é\n>"
    os.kill(renderer._child, signal.SIGKILL)
    assert renderer.render(CHAT[:1]) == "<é\n>"


def test_it_ends_with_a_process_that_is_killed() -> None:
    program = (
        "import os, signal\nfrom byte_models import byte_tokenizer\n"
        "from sq_cpu.serving.renderer import Renderer\n"
        "made = Renderer(byte_tokenizer())\nprint(made._child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent.parent)])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    child = int(ended.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
