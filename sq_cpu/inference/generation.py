"""Text, token by token: a loop around a model's decoder that does nothing else.

A sequence's tokens depend on its own prompt, the settings and the seed, not on what else is in the
batch: a fused decoder gives a row the same bits in any batch, as does a head in int8 (a float head
may differ in its last bits), and what is random is drawn for each prompt, each copy of it, and
position.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.cache import Int8Cache
from sq_cpu.inference.fusing import fused_of
from sq_cpu.models.checks import check_is_module
from sq_cpu.parsing import check_kind

__all__ = ["Sampling", "generate"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises
    ------
    SqCpuError
        For a temperature, top_k or top_p out of its range.
    """

    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among so many of the likeliest; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens whose probabilities reach this sum."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SqCpuError(f"temperature is {self.temperature}; it is 0 or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise SqCpuError(
                f"top_k is {self.top_k} and top_p {self.top_p}; they are at least 0, and above 0 "
                "up to 1"
            )
        if type(self.top_k) is not int or type(self.seed) is not int:
            raise SqCpuError(f"top_k is {self.top_k!r} and seed {self.seed!r}; they are integers")

    def choose(self, logits: Tensor, streams: Sequence[int], position: int) -> list[int]:
        """Return the next token of each sequence.

        Parameters
        ----------
        logits : floating point [sequences, vocabulary]
        streams : of random numbers, one for each sequence: integers of 64 bits
        position : of the new token among those generated

        Raises
        ------
        SqCpuError
            For logits that are not finite.
        """
        if not bool(logits.isfinite().all()):
            raise SqCpuError("the model gives logits that are not finite")
        if self.temperature == 0:
            return logits.argmax(dim=1).tolist()
        logits = logits.double()
        logits = (logits - logits.amax(dim=1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        weights = logits.softmax(dim=1)
        if self.top_p < 1:
            ordered, index = weights.sort(dim=1, descending=True)
            beyond = ordered.cumsum(dim=1) - ordered >= self.top_p
            weights = weights.masked_fill(beyond.scatter(1, index, beyond), 0.0)
        # The least of exponential variables divided by weights is drawn by the weights.
        noise = torch.empty_like(weights)
        for row, stream in zip(noise, streams, strict=True):
            row.exponential_(generator=torch.Generator().manual_seed(_mixed(stream, position)))
        return (weights / noise).argmax(dim=1).tolist()


def _mixed(*values: object) -> int:
    """Return 63 bits that any of the values changes."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue prompts with a fused model (`fuse`).

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
    fused = fused_of(model)
    if fused is None or not fused.has_head:
        raise SqCpuError("the model is not fused, or has no head: sq_cpu.fuse(model) first")
    sampling = Sampling() if sampling is None else sampling
    given = [_integers(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    _check(model, given, max_new_tokens)
    if stop_tokens is None:
        stop_tokens = _stop_tokens(model)
    stops = {*_integers(stop_tokens, "stop_tokens")}
    made: list[list[int]] = [[] for _ in given]
    if not given:
        return made
    fused.refresh()
    copies = [given[:i].count(prompt) for i, prompt in enumerate(given)]
    streams = [_mixed(sampling.seed, *key) for key in zip(given, copies, strict=True)]
    longest = max(map(len, given))
    begins = [longest - len(prompt) for prompt in given]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(begins, given, strict=True)])
    offsets = torch.tensor(begins)[:, None]
    positions = (torch.arange(longest)[None] - offsets).clamp(min=0)
    cache = Int8Cache(model)
    active = [*range(len(given))]
    for step in range(max_new_tokens):
        logits = fused.logits(cache, ids, positions, begins)
        tokens = sampling.choose(logits, [streams[i] for i in active], step)
        for sequence, token in zip(active, tokens, strict=True):
            made[sequence].append(token)
            if on_token is not None:
                on_token(sequence, token)
        going = [i for i, token in enumerate(tokens) if token not in stops]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):
            active = [active[i] for i in going]
            begins = [begins[i] for i in going]
            offsets = offsets[going]
            cache.batch_select_indices(torch.tensor(going))
        ids = torch.tensor([[tokens[i]] for i in going])
        positions = longest + step - offsets
    return made


def _integers(values: Any, what: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        raise SqCpuError(f"{what}: token ids are a list of integers") from None


def _check(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise SqCpuError(f"max_new_tokens is {max_new_tokens!r}; it is an integer of at least 1")
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise SqCpuError(f"prompt {number} is empty")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise SqCpuError(
                f"prompt {number} has ids from {min(prompt)} to {max(prompt)}; the model's are "
                f"0 .. {config.vocab_size - 1}"
            )
        if len(prompt) + max_new_tokens > positions:
            raise SqCpuError(
                f"{len(prompt)} tokens of prompt {number} and {max_new_tokens} new ones exceed the "
                f"model's {positions} positions; ask for fewer"
            )


def _stop_tokens(model: Any) -> list[int]:
    stop = getattr(model.generation_config, "eos_token_id", None)
    return [] if stop is None else [stop] if isinstance(stop, int) else [*stop]
