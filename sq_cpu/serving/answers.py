"""What comes out of the engine becomes text: the choices of one HTTP request, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.requests import Request, Token
from sq_cpu.serving.detokenize import Stops, TextStream
from sq_cpu.serving.engine import Engine, Job
from sq_cpu.serving.metrics import Metrics
from sq_cpu.serving.refusals import Refused

__all__ = ["Answer", "Choice", "Piece", "TokenText"]


@dataclass(frozen=True)
class TokenText:
    """A token with its logprob, and the likeliest ones with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int
    """Where the token begins in the answer's text, in characters."""


@dataclass(frozen=True)
class Piece:
    """What a step adds to a choice."""

    choice: int
    text: str
    tokens: tuple[TokenText, ...]
    finish: Literal["stop", "length"] | None


@dataclass
class Choice:
    """One answer to one prompt: its ids become pieces.

    Parameters
    ----------
    index : among the choices of the HTTP request
    request : what the engine runs
    advance : of a grammar, called with each token on the engine's thread
    decode : ids to text, without special tokens
    decode_one : an id to its text, special or not
    stops : texts that end the choice
    """

    index: int
    request: Request
    advance: Callable[[int], None] | None
    decode: Callable[[list[int]], str]
    decode_one: Callable[[int], str]
    stops: Sequence[str]
    tokens: int = field(default=0, init=False)
    finish: Literal["stop", "length"] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decode, self.request.prompt)
        self._stops = Stops(self.stops)
        self._length = 0

    def take(self, tokens: Sequence[Token]) -> Piece:
        """Return what some tokens add; those after a text that stops are dropped.

        Raises `Refused` for a token that there is not.
        """
        text, texts = "", []
        for token in tokens:
            if token.finish == "error":
                raise Refused(500, token.error)
            self.tokens += 1
            if token.logprob is not None and token.finish != "stop":
                texts.append(self._token_text(token, token.logprob))
            new = self._stream.push(token.id)
            if token.finish is not None:
                new += self._stream.finish()
            self._length += len(new)
            out, stopped = self._stops.push(new)
            self.finish = "stop" if stopped else token.finish
            if token.finish is not None and not stopped:
                out += self._stops.finish()
            text += out
            if self.finish is not None:
                break
        return Piece(self.index, text, tuple(texts), self.finish)

    def _token_text(self, token: Token, logprob: float) -> TokenText:
        top = tuple((self.decode_one(each), value) for each, value in token.top)
        offset = self._length + self._stream.held
        return TokenText(self.decode_one(token.id), logprob, top, offset)


class Answer:
    """The choices of one HTTP request, on the event loop.

    Parameters
    ----------
    engine : that runs them
    choices : numbered from 0
    metrics : told when tokens come
    arrival : of the HTTP request, in the event loop's time
    """

    def __init__(
        self, engine: Engine, choices: Sequence[Choice], metrics: Metrics, arrival: float
    ) -> None:
        self.choices = [*choices]
        self._engine = engine
        self._clock = asyncio.get_running_loop().time
        self._steps: asyncio.Queue[tuple[Job, list[Token]] | SqCpuError] = asyncio.Queue()
        self._jobs = {Job(choice.request, self, choice.advance): choice for choice in choices}
        self._timers = {job: metrics.timer(arrival) for job in self._jobs}

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompts have; those of the choices of one prompt count once."""
        prompts = {id(choice.request.prompt): choice.request.prompt for choice in self.choices}
        return sum(len(prompt) for prompt in prompts.values())

    def receive(self, job: Job, tokens: list[Token]) -> None:
        """Take a step's tokens of a job."""
        self._timers[job].tokens(self._clock(), len(tokens))
        self._steps.put_nowait((job, tokens))

    def fail(self, error: SqCpuError) -> None:
        """Take it that no more tokens come."""
        self._steps.put_nowait(error)

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """Run the choices; yields what came since the last time, until all have ended.

        Raises `Refused` where the engine refuses a request or fails. Closed early, it cancels what
        still runs.
        """
        try:
            for job in self._jobs:
                self._engine.submit(job)
            while any(choice.finish is None for choice in self.choices):
                steps = [await self._steps.get()]
                while not self._steps.empty():
                    steps.append(self._steps.get_nowait())
                if made := [piece for step in steps for piece in self._taken(step)]:
                    yield made
        finally:
            for job, choice in self._jobs.items():
                if choice.finish is None:
                    self._timers[job].finish(self._clock(), "abort")
                self._engine.cancel(job)

    def _taken(self, step: tuple[Job, list[Token]] | SqCpuError) -> list[Piece]:
        if isinstance(step, SqCpuError):
            raise Refused(400 if self._engine.failure is None else 500, str(step)) from step
        job, tokens = step
        choice = self._jobs[job]
        if choice.finish is not None:  # it ran on while its last text was on its way here
            return []
        piece = choice.take(tokens)
        if piece.finish is not None:
            self._timers[job].finish(self._clock(), piece.finish)
            self._engine.cancel(job)
        return [piece]
