"""How the next token of a sequence is chosen; cpp/include/sq_cpu/sampling.h has the arithmetic."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core

__all__ = ["Penalties", "Sampler", "Sampling", "likeliest", "log_probabilities", "mixed"]

_MOST = 1e30  # so that neither it, its reciprocal, nor millions of it leave the range of fp32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises
    ------
    SqCpuError
        For a value of another type, or out of its range.
    """

    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among so many of the likeliest; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    min_p: float = 0.0
    """Choose among tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that were there, and multiplies the negative ones
    (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that a token was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, _MOST),
            ("top_p", 1 / _MOST, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1 / _MOST, _MOST),
            ("presence_penalty", -_MOST, _MOST),
            ("frequency_penalty", -_MOST, _MOST),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise SqCpuError(f"{name} is {value!r}; it is a number from {low:g} to {high:g}")
        for name in ("top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise SqCpuError(f"{name} is {getattr(self, name)!r}; it is an integer")
        if not 0 <= self.top_k < 2**63:
            raise SqCpuError(f"top_k is {self.top_k}; it is at least 0")
        try:
            bias = {operator.index(token): float(value) for token, value in self.logit_bias.items()}
        except (AttributeError, TypeError, ValueError):
            bias = {-1: 0.0}
        if not all(token >= 0 and abs(value) <= _MOST for token, value in bias.items()):
            raise SqCpuError(
                f"logit_bias is {self.logit_bias!r}; it maps ids to numbers up to {_MOST:g}"
            )
        object.__setattr__(self, "logit_bias", bias)

    @property
    def edits(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        plain = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or plain != (1.0, 0.0, 0.0)

    def stream(self, prompt: Sequence[int], number: int) -> int:
        """Return the key of the random numbers of a prompt's `number`-th continuation."""
        return mixed(self.seed, prompt, number)


class Penalties:
    """What a sequence's tokens so far do to its logits.

    Parameters
    ----------
    prompt : token ids
    generated : token ids
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int] = ()
    ) -> None:
        self._sampling = sampling
        self._there = {*prompt, *generated}
        self._generated = Counter(generated)

    def add(self, token: int) -> None:
        """Count a token that was generated."""
        self._there.add(token)
        self._generated[token] += 1

    def edits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, and what their logits are divided by and what is added."""
        sampling = self._sampling
        addends = dict(sampling.logit_bias)
        for token, times in self._generated.items():
            less = sampling.presence_penalty + sampling.frequency_penalty * times
            addends[token] = addends.get(token, 0.0) - less
        there = self._there if sampling.repetition_penalty != 1 else frozenset[int]()
        ids = sorted(there | addends.keys())
        return (
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor([sampling.repetition_penalty if i in there else 1.0 for i in ids]),
            torch.tensor([addends.get(i, 0.0) for i in ids]),
        )


class Sampler:
    """The settings of a batch's sequences, as the library takes them.

    Parameters
    ----------
    settings : of each sequence
    streams : of random numbers, one for each sequence: integers of 63 bits
    """

    def __init__(self, settings: Sequence[Sampling], streams: Sequence[int]) -> None:
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu")

        self._columns = (
            column([each.temperature for each in settings], torch.float32),
            column([each.top_k for each in settings], torch.int64),
            column([each.top_p for each in settings], torch.float32),
            column([each.min_p for each in settings], torch.float32),
            torch.tensor(streams, dtype=torch.int64, device="cpu"),
        )

    def choose(
        self,
        logits: Tensor,
        positions: Tensor,
        ids: Tensor,
        penalties: Sequence[Penalties | None] | None = None,
        allowed: Sequence[Tensor | None] | None = None,
    ) -> list[int]:
        """Return the next token of each sequence, and write them to `ids`.

        It is -1 where logits are not finite, and -2 where no token is allowed.

        Parameters
        ----------
        logits : fp32 [sequences, vocabulary]; penalties and masks change them
        positions : int64 [sequences]: of the new tokens among those generated
        ids : int64 [sequences]
        allowed : int32 [vocabulary / 32, rounded up], a bit for each token that may be next

        Raises
        ------
        SqCpuError
            For other shapes and dtypes, and a bias of a token that there is not.
        """
        _core.sample(
            logits,
            *self._columns,
            positions,
            None
            if penalties is None
            else [None if each is None else each.edits() for each in penalties],
            None if allowed is None else [*allowed],
            ids,
        )
        return ids.tolist()


def mixed(*values: object) -> int:
    """Return 63 bits that any of the values changes."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def log_probabilities(logits: Tensor) -> Tensor:
    """Return them in fp64 [rows, vocabulary]: the same bits in any batch."""
    return torch.stack([row.double().log_softmax(0) for row in logits])


def likeliest(row: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the tokens of the highest values, and these; all where there are no more."""
    values, ids = row.topk(min(count, len(row)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
