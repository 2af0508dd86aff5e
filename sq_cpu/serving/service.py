"""Requests become answers: checked against the model and the queue, then run."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sq_cpu.inference.requests import Request
from sq_cpu.serving.answers import Answer, Choice
from sq_cpu.serving.engine import Engine
from sq_cpu.serving.grammar import Grammar, Grammars
from sq_cpu.serving.metrics import Metrics
from sq_cpu.serving.prompts import Prompts, aside
from sq_cpu.serving.protocol import ChatRequest, CompletionRequest, JsonFormat, SchemaFormat
from sq_cpu.serving.refusals import Refused
from sq_cpu.serving.watch import Watch

__all__ = ["Limits", "Service"]

_COMPLETION_TOKENS = 16  # of OpenAI's


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes
    ----------
    sequences : that run at once
    queue : sequences that may wait beside them
    positions : tokens of a prompt and its answer
    vocabulary : ids of the model
    """

    sequences: int
    queue: int
    positions: int
    vocabulary: int


class Service:
    """What the routes call; all of it on the event loop.

    Parameters
    ----------
    name : of the model
    engine, prompts, tokenizer : the tokenizer makes text alone
    stop_tokens : of the model
    limits : what is refused
    watch : looks at the model's rows when requests have ended; None: nothing does

    Attributes
    ----------
    metrics : of this server
    draining : no new request is taken
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        prompts: Prompts,
        tokenizer: Any,
        stop_tokens: Sequence[int],
        limits: Limits,
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.metrics = Metrics(engine.scheduler, name, watch)
        self.draining = False
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._stop_tokens = [*stop_tokens]
        self._limits = limits
        self._watch = watch
        # A thread of its own: some schemas take seconds.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="sq_cpu grammars")
        self._grammars = Grammars(tokenizer, limits.vocabulary, stop_tokens)
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, if there is room."""
        return self.engine.alive and not self.draining

    async def drain(self) -> None:
        """Take no new request, and wait until those that were taken have ended."""
        self.draining = True
        await self._idle.wait()

    @asynccontextmanager
    async def completion(self, request: CompletionRequest) -> AsyncIterator[Answer]:
        """Answer one or several prompts; raises `Refused`."""
        prompts = request.prompts()
        async with self._room(request, len(prompts)) as arrival:
            ids = [
                await self._prompts.of_text(prompt) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
            most = request.max_tokens or _COMPLETION_TOKENS
            choices = await self._choices(request, ids, most, request.logprobs)
            yield Answer(self.engine, choices, self.metrics, arrival)

    @asynccontextmanager
    async def chat(self, request: ChatRequest) -> AsyncIterator[Answer]:
        """Answer a chat; raises `Refused`."""
        most, likeliest = request.most_tokens(), request.likeliest()
        async with self._room(request, 1) as arrival:
            ids = await self._prompts.of_chat([each.of_template() for each in request.messages])
            choices = await self._choices(request, [ids], most, likeliest)
            yield Answer(self.engine, choices, self.metrics, arrival)

    @asynccontextmanager
    async def _room(
        self, request: CompletionRequest | ChatRequest, prompts: int
    ) -> AsyncIterator[float]:
        """Hold a place for each sequence of a request; gives the time of its arrival."""
        if request.model != self.name:
            raise Refused(
                404,
                f"there is no model {request.model[:200]!r}; here is {self.name!r}",
                param="model",
                code="model_not_found",
            )
        if not self.ready:
            why = "the server is shutting down" if self.draining else "the engine has failed"
            raise Refused(503, f"{why}; try again elsewhere")
        wanted = prompts * (request.n or 1)
        most = self._limits.sequences + self._limits.queue
        if wanted > most:
            raise Refused(400, f"{wanted} answers at once; the server has room for {most}")
        if self._taken + wanted > most:
            raise Refused(429, "the queue is full; try again later", code="queue_full")
        self._taken += wanted
        self._idle.clear()
        try:
            yield asyncio.get_running_loop().time()
        finally:
            self._taken -= wanted
            if self._taken == 0:
                self._idle.set()
            if self._watch is not None:
                self._watch.glance()

    async def _choices(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        most: int | None,
        logprobs: int | None,
    ) -> list[Choice]:
        sampling = request.sampling(secrets.randbits(63), self._limits.vocabulary)
        lengths = [self._new_tokens(len(ids), most) for ids in prompts]
        wanted = request.response_format
        make = None
        if isinstance(wanted, JsonFormat | SchemaFormat):
            form = wanted
            make = await aside(self._compiling, lambda: self._grammars.of(form))
        choices: list[Choice] = []
        for ids, new in zip(prompts, lengths, strict=True):
            for stream in range(request.n or 1):
                grammar: Grammar | None = make() if make is not None else None
                choices.append(
                    Choice(
                        index=len(choices),
                        request=Request(
                            prompt=ids,
                            max_new_tokens=new,
                            sampling=sampling,
                            stop_tokens=self._stop_tokens,
                            logprobs=logprobs,
                            stream=stream,
                            allowed=None if grammar is None else grammar.allowed,
                        ),
                        advance=None if grammar is None else grammar.advance,
                        decode=self._decode,
                        decode_one=self._decode_one,
                        stops=request.stops(),
                    )
                )
        return choices

    def _new_tokens(self, prompt: int, most: int | None) -> int:
        """Return how many tokens an answer may have, `most` or what the context leaves."""
        new = max(1, self._limits.positions - prompt) if most is None else most
        if prompt + new > self._limits.positions:
            raise Refused(
                400,
                f"{prompt} tokens of prompt and {new} of the answer exceed the context of "
                f"{self._limits.positions}; send or ask for fewer",
                code="context_length_exceeded",
            )
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._text(ids, special=False)

    def _decode_one(self, token: int) -> str:
        return self._text([token], special=True)

    def _text(self, ids: list[int], special: bool) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text
