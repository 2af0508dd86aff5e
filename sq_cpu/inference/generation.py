"""Text, token by token: a scheduler run until nothing is left to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.fusing import fused_of
from sq_cpu.inference.pages import pages_of, pages_that_fit
from sq_cpu.inference.requests import Request, integers
from sq_cpu.inference.sampling import Sampling
from sq_cpu.inference.scheduler import Scheduler
from sq_cpu.models.checks import check_is_module
from sq_cpu.parsing import check_kind

__all__ = ["generate", "generate_batch", "stop_tokens_of"]

_SEQUENCES = 256  # at once
_POSITIONS = 1 << 24  # of a model whose config does not limit them


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue prompts with a fused model (`fuse`), as many at once as there is room for.

    A prompt's tokens depend on it, the settings and the seed, not on the other prompts; a copy of
    a prompt draws random numbers of its own.

    Parameters
    ----------
    model : a decoder with a head
    prompts : token ids of each, of any lengths: lists of integers, or tensors
    max_new_tokens : for each prompt, at most
    sampling : how tokens are chosen; None: always the likeliest
    stop_tokens : what ends a sequence, and is part of it; None: those of the model's generation
        config
    on_token : called with a prompt's number and its next token, as soon as that is known

    Returns
    -------
    the new tokens of each prompt

    Raises
    ------
    SqCpuError
        For a model that is not fused or has no head, an empty prompt, ids that are not in the
        vocabulary, more tokens than the model has positions, and logits that are not finite.
    """
    check_is_module(model)
    check_kind(Iterable, "a list of prompts", prompts=prompts)
    check_kind(Sampling | None, "a Sampling", sampling=sampling)
    check_kind(Callable | None, "a function of a prompt's number and a token", on_token=on_token)
    given = [integers(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    if stop_tokens is None:
        stop_tokens = stop_tokens_of(model)
    copies: Counter[tuple[int, ...]] = Counter()
    requests = []
    for prompt in given:
        request = Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling() if sampling is None else sampling,
            stop_tokens=stop_tokens,
            stream=copies[tuple(prompt)],
        )
        copies[tuple(prompt)] += 1
        requests.append(request)
    return generate_batch(model, requests, on_token=on_token)


def generate_batch(
    model: nn.Module,
    requests: Iterable[Request],
    *,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Answer requests, each with its own settings; as `generate`.

    Returns
    -------
    the new tokens of each request
    """
    given = [*requests]
    scheduler = Scheduler(model, pages=_pages(model, given), sequences=_SEQUENCES)
    index = {}
    for i, request in enumerate(given):
        try:
            index[scheduler.add(request)] = i
        except SqCpuError as error:
            raise SqCpuError(f"prompt {i}: {error}") from None
    made: list[list[int]] = [[] for _ in given]
    while scheduler.busy:
        for token in scheduler.step():
            i = index[token.request]
            if token.finish == "error":
                raise SqCpuError(f"prompt {i}: {token.error}")
            made[i].append(token.id)
            if on_token is not None:
                on_token(i, token.id)
    return made


def stop_tokens_of(model: Any) -> list[int]:
    """Return what ends a text, as the model's generation config has it."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    return [] if stop is None else [stop] if isinstance(stop, int) else [*stop]


def _pages(model: Any, requests: Sequence[Request]) -> int:
    """Return as many pages as the largest requests that run at once can need, and memory holds."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or _POSITIONS
    needs = [
        pages_of(min(len(each.prompt) + each.max_new_tokens, most))  # more is refused
        for each in requests
        if isinstance(each.max_new_tokens, int) and isinstance(each.prompt, Sized)
    ]
    largest = sorted(needs)[-_SEQUENCES:]
    fused = fused_of(model)
    # The largest may need more: then one runs after the other.
    fit = sum(largest) if fused is None else pages_that_fit(fused.page_bytes)
    return max(1, *largest[-1:], min(sum(largest), fit))
