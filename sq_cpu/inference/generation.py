"""Text, token by token: a loop around a model's decoder that does nothing else.

A sequence's tokens depend on its own prompt, the settings and the seed alone, not on what else is
in the batch: a fused decoder gives a row the same bits in any batch, and what is random is drawn
for each sequence and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.cache import Int8Cache
from sq_cpu.inference.fusing import fused_of

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
        if not -(2**63) <= self.seed < 2**63:
            raise SqCpuError(f"seed is {self.seed}; it has 64 bits")

    def choose(self, logits: Tensor, sequences: Sequence[int], position: int) -> list[int]:
        """Return the next token of each sequence.

        Parameters
        ----------
        logits : floating point [sequences, vocabulary]
        sequences : their numbers, each of which draws its own
        position : of the new token among those generated
        """
        if self.temperature == 0:
            return logits.argmax(dim=1).tolist()
        logits = logits.float() / self.temperature
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
        for row, sequence in zip(noise, sequences, strict=True):
            generator = torch.Generator().manual_seed(hash((self.seed, sequence, position)))
            row.exponential_(generator=generator)
        return (weights / noise).argmax(dim=1).tolist()


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
    prompts : token ids of each, of any lengths
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
        For a model that is not fused, an empty prompt, ids that are not in the vocabulary, and more
        tokens than the model has positions.
    """
    fused = fused_of(model)
    if fused is None:
        raise SqCpuError("the model is not fused: sq_cpu.fuse(model) first")
    sampling = sampling or Sampling()
    _check(model, prompts, max_new_tokens)
    stops = _stop_tokens(model) if stop_tokens is None else {*stop_tokens}
    made: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return made
    longest = max(map(len, prompts))
    begins = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + [*ids] for pad, ids in zip(begins, prompts, strict=True)])
    offsets = torch.tensor(begins)[:, None]
    positions = (torch.arange(longest)[None] - offsets).clamp(min=0)
    cache = Int8Cache(model)
    active = [*range(len(prompts))]
    for step in range(max_new_tokens):
        logits = fused.logits(cache, ids, positions, begins)
        tokens = sampling.choose(logits, active, step)
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


def _check(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise SqCpuError(f"max_new_tokens is {max_new_tokens}; it is at least 1")
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts):
        if not len(prompt):
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


def _stop_tokens(model: Any) -> set[int]:
    stop = getattr(model.generation_config, "eos_token_id", None)
    return set() if stop is None else {stop} if isinstance(stop, int) else {*stop}
