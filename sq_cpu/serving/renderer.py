"""The process that renders chat templates: forked while the server is small and has one thread."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from sq_cpu.errors import SqCpuError
from sq_cpu.serving.chat import chat_text

__all__ = ["Renderer"]

_INSTEAD = "use /v1/completions"


class Renderer:
    """Renders chats, one at a time, in a process that forks another for each.

    To fork the server itself would copy the page tables of the whole model for each chat. The
    process ends when this one does, however that ends; where it was killed, it is made again.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Whose chat template it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._ours, theirs = Pipe()
        with warnings.catch_warnings():
            # A fork beside the idle threads of numpy; the child uses none.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child = os.fork()
        if self._child == 0:
            _answer_all(self._tokenizer, theirs)
        theirs.close()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the chat's text; raises `SqCpuError` as `chat_text`."""
        with self._lock:
            try:
                good, text = self._ask(messages)
            except (OSError, EOFError):
                self.close()
                self._start()
                good, text = self._ask(messages)
        if not good:
            raise SqCpuError(text)
        return text

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> tuple[bool, str]:
        self._ours.send([dict(message) for message in messages])
        answer: tuple[bool, str] = self._ours.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        os.waitpid(self._child, 0)


def _answer_all(tokenizer: Any, theirs: Connection) -> None:
    """Answer until the other end is closed, and end this process."""
    try:  # whatever happens, none of the parent's code runs here
        for ignored in (signal.SIGINT, signal.SIGTERM):  # the server drains: it ends this
            signal.signal(ignored, signal.SIG_IGN)
        # Of these, a socket would keep the server's port.
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        while True:
            messages = theirs.recv()
            try:
                theirs.send((True, chat_text(tokenizer, messages, instead=_INSTEAD)))
            except SqCpuError as error:
                theirs.send((False, str(error)))
    finally:
        os._exit(0)
