"""Prompts to ids, off the event loop: a long text takes tenths of a second, a template may too."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sq_cpu.errors import SqCpuError
from sq_cpu.serving.refusals import Refused
from sq_cpu.serving.renderer import Renderer

__all__ = ["Prompts", "aside"]

_Result = TypeVar("_Result")


class Prompts:
    """Reads prompts in a thread of its own, with a tokenizer of its own: they are not to be shared.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    renderer : of its chat template
    """

    def __init__(self, tokenizer: Any, renderer: Renderer) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._renderer = renderer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sq_cpu prompts")

    async def of_text(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued."""
        return await aside(self._thread, lambda: self._ids(text, add_special_tokens=True))

    async def of_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a chat that is to be answered; its text has its special tokens."""

        def ids() -> list[int]:
            return self._ids(self._renderer.render(messages), add_special_tokens=False)

        return await aside(self._thread, ids)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids


async def aside(thread: ThreadPoolExecutor, call: Callable[[], _Result]) -> _Result:
    """Return what a call gives in a thread; its `SqCpuError` becomes `Refused`."""
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, call)
    except SqCpuError as error:
        raise Refused(400, str(error)) from error
