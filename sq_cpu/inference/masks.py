"""Masks as patterns: what int8 attention can do without a mask of all queries and keys.

transformers makes a mask once for all layers of a kind. For `attn_implementation="sq_cpu"` it is a
`LazyTensor` of a `MaskPattern`; a mask that is no such pattern is the additive one of "eager".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from sq_cpu.inference.lazy import LazyTensor

__all__ = ["MaskPattern", "make_mask", "pattern_of", "token_runs"]


@dataclass(frozen=True)
class MaskPattern:
    """Each sequence is one run of tokens, which see each other as `causal` and `window` say."""

    causal: bool
    window: int
    """Of the tokens up to itself a token sees the last so many; 0: all."""
    new: int
    """Positions of the call."""
    total: int
    """Positions of the sequences, the new ones among them."""
    begins: list[int] | None
    """The first token's position in each sequence; None: 0. What is before is padding."""
    ends: list[int] | None
    """One after the last token's position in each sequence; None: total."""


def pattern_of(mask: Tensor | None) -> MaskPattern | None:
    """Return the pattern that a mask stands for; None for an ordinary tensor and no mask."""
    if isinstance(mask, LazyTensor) and isinstance(mask.source, MaskPattern):
        return mask.source
    return None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor:
    """Return the mask of a call; the parameters are those of transformers' `sdpa_mask`.

    Returns
    -------
    [batch, 1, q_length, kv_length] of `dtype`, to be added to the scores
    """

    def eager() -> Tensor:
        mask: Tensor = masking_utils.eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            dtype=dtype,
            **kwargs,
        )
        return mask

    # Without the permission to skip it, a mask is no pattern, or is to be made part of another.
    if kv_offset != 0 or int(q_offset) + q_length != kv_length:
        return eager()
    if mask_function is masking_utils.bidirectional_mask_function:
        kind = (False, 0) if allow_is_bidirectional_skip else None
    elif allow_is_causal_skip:
        kind = _causal_kind(mask_function, local_size, batch_size, int(q_offset), q_length)
    else:
        kind = None
    if kind is None:
        return eager()
    begins = ends = None
    if attention_mask is not None:
        runs = token_runs(attention_mask, kv_length)
        if runs is None:
            return eager()
        begins, ends = runs
    pattern = MaskPattern(*kind, q_length, kv_length, begins, ends)
    return LazyTensor((batch_size, 1, q_length, kv_length), dtype, pattern, eager)


def _causal_kind(
    mask_function: Callable[..., Any], local_size: int | None, batch: int, first: int, count: int
) -> tuple[bool, int] | None:
    """Return `causal` and `window` of what transformers may skip: causal, sliding or chunked."""
    if local_size is None:
        return (True, 0) if mask_function is masking_utils.causal_mask_function else None
    # A window's edges, one key further on either side, of each query: a chunk has others.
    query = torch.arange(first, first + count)
    sequence = torch.arange(batch)[:, None]

    def sees(key: Tensor) -> Tensor:
        return torch.as_tensor(mask_function(sequence, torch.zeros_like(sequence), query, key))

    oldest = query - (local_size - 1)
    inside = sees(query).all() and (sees(oldest) | (oldest < 0)).all()
    outside = (sees(query + 1) | (sees(oldest - 1) & (oldest > 0))).any()
    return (True, local_size) if inside and not outside else None


def token_runs(mask: Tensor, length: int) -> tuple[list[int] | None, list[int] | None] | None:
    """Return where the tokens of each sequence begin and end; None where one has a gap."""
    mask = mask[:, :length].bool()
    if mask.shape[1] < length:  # transformers takes what a mask does not reach for padding
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    if mask.all():
        return None, None
    counts = mask.sum(dim=1)
    begins = mask.int().argmax(dim=1).masked_fill(counts == 0, length)
    ends = length - mask.int().flip(1).argmax(dim=1)
    ends = ends.masked_fill(counts == 0, length)
    if not torch.equal(ends - begins, counts):
        return None
    return begins.tolist(), None if bool((ends == length).all()) else ends.tolist()
