"""A chat template rendered: a program that came with a model, and so held to a time and a size."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError, first_line

__all__ = ["chat_text"]

_SECONDS = 20
_CHARACTERS = 1 << 22
_MEMORY = 1 << 30


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, instead: str = "leave out --chat"
) -> str:
    """Return the text that a tokenizer's chat template makes of messages, and asks to answer them.

    It is rendered by a child process, which can be stopped, whatever the template does.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    messages : of a role and a content each
    instead : what the error tells to do

    Raises
    ------
    SqCpuError
        For a tokenizer without a template, one that fails, and one that takes more than 20 s or
        gives more than 4 MB.
    """
    if not tokenizer.chat_template:
        raise SqCpuError(f"the model's tokenizer has no chat template; {instead}")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # A fork beside threads; the child uses none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render(tokenizer, messages, writing)
    os.close(writing)
    try:
        answer = _read(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kind, text = answer[:1], answer[1:].decode("utf-8", "replace")
    if kind != b"+":
        raise SqCpuError(
            f"the model's chat template fails ({text or 'its process ended'}); {instead}"
        )
    return text


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], writing: int) -> None:
    """Write "+" and the text, or "-" and why there is none, and end this process."""
    try:  # whatever happens, none of the parent's code runs here
        answer = _answer(tokenizer, messages)
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _answer(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> bytes:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + _MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        chat = [dict(message) for message in messages]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return b"+" + str(text).encode("utf-8", "replace")
    except BaseException as error:  # a template may raise anything
        return b"-" + first_line(error).encode("utf-8", "replace")


def _read(reading: int) -> bytes:
    deadline = time.monotonic() + _SECONDS
    parts: list[bytes] = []
    while sum(map(len, parts)) <= _CHARACTERS:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return f"-it takes more than {_SECONDS} s".encode()
        part = os.read(reading, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b"-it gives more than 4 MB"
