"""What is asked of a scheduler, and what it answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.sampling import Sampling

__all__ = ["Finish", "Request", "Statistics", "Token", "integers"]

Finish = Literal["stop", "length", "error"]

# By what the library says instead of a token.
_ERRORS = {
    -1: "the model gives logits that are not finite",
    -2: "no token is allowed to come next",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    """Token ids."""
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()
    """Each ends the sequence, and is part of it."""
    logprobs: int | None = None
    """Logarithms of probabilities: None: none; 0: of the chosen token; n: and of the n likeliest,
    before penalties and temperature."""
    stream: int = 0
    """Which stream of random numbers, beside the seed: continuation i of a prompt."""
    allowed: Callable[[], Tensor] | None = None
    """Called before each token, and again where a step failed: int32 [vocabulary / 32, rounded up],
    bit id % 32 of word id // 32 set where that token may come next. Where it raises, the request
    ends with an error."""


@dataclass(frozen=True)
class Token:
    """A token that a request got."""

    request: int
    """The number that `Scheduler.add` gave."""
    id: int
    """Negative where there is none: `finish` is "error"."""
    logprob: float | None
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and theirs."""
    finish: Finish | None
    """Why it is the last."""
    failure: str | None = None
    """What the request's `allowed` raised."""

    @property
    def error(self) -> str:
        """Return why a request failed."""
        return self.failure or _ERRORS[self.id]


@dataclass
class Statistics:
    """What a scheduler has done."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    """Of prompts that were looked up among the pages."""
    prefix_hit_tokens: int = 0
    """And found there."""
    preemptions: int = 0


def integers(values: Any, what: str) -> list[int]:
    """Return a list of integers; `SqCpuError` for anything else."""
    try:
        return [operator.index(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        raise SqCpuError(f"{what}: token ids are a list of integers") from None
