"""Perplexity, by one fixed protocol: windows of a text, each scored alone.

The windows that score a model are cut like those that calibrate it; `token_windows` serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import check_length, evaluating
from sq_cpu.models.checks import check_ids, check_is_module, input_embeddings
from sq_cpu.models.tokenizers import encoded, leading_ids
from sq_cpu.parsing import check_kind, check_whole
from sq_cpu.progress import track

__all__ = ["TextPerplexity", "perplexity", "token_windows"]


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    window: int = 512,
    windows: int = 20,
    progress: bool | None = None,
) -> float:
    """Return exp(mean negative log-likelihood) over windows of `text` (see `token_windows`).

    Each window is scored alone, from its second token on; the mean is over all scored tokens, in
    float64. `progress=None` shows a bar when stderr is a terminal.

    Raises `SqCpuError` when the text is too short, when a window is longer than the model's context
    and when the model's logits are NaN or Inf.
    """
    scored = _running(model, tokenizer, text, window, windows, progress)
    return list(scored)[-1]


@dataclass(frozen=True, eq=False)
class TextPerplexity:
    """`perplexity` of a text as a function of the model alone: what `autotune` evaluates.

    Called, it returns an iterator over the perplexities of the first, the first two, ... windows.
    """

    tokenizer: Any
    text: str | Sequence[str]
    window: int = 512
    windows: int = 20

    def __call__(self, model: nn.Module) -> Iterator[float]:
        """Yield as said above; raises as `perplexity`."""
        return _running(model, self.tokenizer, self.text, self.window, self.windows, False)


def _running(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    window: int,
    windows: int,
    progress: bool | None,
) -> Iterator[float]:
    """Yield the perplexity after every window."""
    check_is_module(model)
    batches = token_windows(tokenizer, text, window=window, windows=windows)
    check_length(model, window, "a window")
    for ids in batches:
        check_ids(input_embeddings(model), "the model's embeddings", ids)
    total, targets = 0.0, 0
    # One window a call: a per-tensor activation scale would tie together those of a batch.
    for index, ids in enumerate(track(batches, "scoring", progress)):
        with evaluating(model):
            output = model(ids)
            logits: Tensor = getattr(output, "logits", output)
            loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
        if not loss.isfinite().all():
            raise SqCpuError(f"the model gives NaN or Inf on window {index} of the text")
        total += float(loss.double().sum())
        targets += loss.numel()
        # Past float64's range a perplexity says no more than inf.
        mean = total / targets
        yield math.exp(mean) if mean < 700 else math.inf


def token_windows(
    tokenizer: Any, text: str | Sequence[str], *, window: int, windows: int
) -> list[Tensor]:
    """Cut `text` into windows of token ids, int64 [1, window] each.

    A string gives `windows` of them, number k starting at k * ((len - window) // windows) of its
    ids. A sequence of documents gives the first ids of each of its first `windows` documents.

    No special tokens are added, but for one case: what the tokenizer by itself puts in front of a
    text, its BOS token first, is what the model is to see there. So every window is these tokens
    and as many ids of the text as are left (see `leading_ids`).

    Raises `SqCpuError` when there is too little text, or a window has no token to score.
    """
    check_whole(2, window=window)
    check_whole(1, windows=windows)
    check_kind(Sequence, "a text, or a list of texts", text=text)
    front = leading_ids(tokenizer)
    length = window - len(front)
    if length < 1:
        raise SqCpuError(
            f"a window of {window} tokens is filled by the {len(front)} that the tokenizer puts in "
            "front: ask for longer windows"
        )
    if isinstance(text, str):
        ids = _ids(tokenizer, text)
        step = (len(ids) - length) // windows
        if len(ids) < length or (step == 0 and windows > 1):
            raise SqCpuError(
                f"the text has {len(ids)} tokens; {windows} windows of {window} need "
                f"{length if windows == 1 else length + windows}: give more text or ask for less"
            )
        pieces = [ids[k * step :][:length] for k in range(windows)]
    else:
        pieces = [_ids(tokenizer, document)[:length] for document in text[:windows]]
        if not pieces:
            raise SqCpuError("no text: the list of documents is empty")
        for number, piece in enumerate(pieces):
            if len(piece) < length:
                raise SqCpuError(
                    f"document {number} has {len(piece)} tokens and a window takes {length}: "
                    "ask for shorter windows or drop the document"
                )
    return [torch.tensor([front + piece]) for piece in pieces]


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: no warning that the whole text exceeds the model's context.
    return encoded(tokenizer, text, add_special_tokens=False, verbose=False)
