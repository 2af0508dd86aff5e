"""Int8 attention for every model of transformers: `attn_implementation="sq_cpu"`.

Importing this module registers it. Keys and values of an int8 cache are read where they lie; of a
call without a past, they are put into pages of their own. Everything else is computed exactly, in
floats, from what it was given: masks that are no `MaskPattern`, float caches, weights that are
asked for, gradients. A warning says so, once for each reason.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.cache import update_of
from sq_cpu.inference.kv_kinds import kv_kind
from sq_cpu.inference.masks import MaskPattern, make_mask, pattern_of
from sq_cpu.inference.pages import call_rows
from sq_cpu.kernels.paged_attention import PAGE_TOKENS, AttentionOptions, KvKind, KvPages

__all__ = ["ATTENTION", "attention", "attention_in_floats"]

ATTENTION = "sq_cpu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scaling * query @ key.T + mask) @ value, as transformers calls it.

    Parameters
    ----------
    query : [batch, heads, new, channels]
    key, value : [batch, kv_heads, positions, channels]
    attention_mask : of `make_mask`, another that is added or says what is seen, or None: causal
        where `is_causal`, or `module.is_causal`, says so
    softcap, s_aux, sinks : of the scores (Gemma 2), and a score beside them for each head (gpt-oss)

    Returns
    -------
    [batch, new, heads, channels], and the weights where `output_attentions` asks for them

    Raises
    ------
    SqCpuError
        For a model whose queries choose their keys (sparse attention).
    """
    if any(others.get(name) is not None for name in ("indices", "block_indices", "cache")):
        raise SqCpuError(
            "int8 attention has no sparse or continuously batched form; "
            'use attn_implementation="sdpa"'
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    sinks = s_aux if sinks is None else sinks
    dropout = dropout if module.training else 0.0
    pattern = pattern_of(attention_mask)
    if attention_mask is None:
        total, new = key.shape[2], query.shape[2]
        window = sliding_window or 0 if causal else 0
        pattern = MaskPattern(causal, window, new, total, None, None)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if pattern is None:
        _say("a mask that is not causal or sliding over runs of tokens")
    elif not (output_attentions or dropout or needs_grad or position_bias is not None):
        options = AttentionOptions(
            scale=scale,
            causal=pattern.causal,
            window=pattern.window,
            softcap=softcap or 0.0,
            sinks=None if sinks is None else sinks.detach().float().flatten(),
        )
        y = _over_pages(module, query, key, value, pattern, options)
        if y is not None:
            return y, None
    y, weights = _in_floats(
        query,
        key,
        value,
        _added(attention_mask, pattern, query, key, position_bias),
        scale,
        softcap,
        sinks,
        dropout,
    )
    return y, weights if output_attentions else None


def attention_in_floats(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return what `attention` does without dropout, exact, and its weights.

    `attention_mask` is added to the scores; None: causal.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    total, new = key.shape[2], query.shape[2]
    causal = MaskPattern(True, 0, new, total, None, None)
    added = _added(attention_mask, causal, query, key, None)
    return _in_floats(query, key, value, added, scale, softcap, s_aux, 0.0)


def _over_pages(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: MaskPattern,
    options: AttentionOptions,
) -> Tensor | None:
    """Return int8 attention, or bf16's; None where it is not possible, after a warning."""
    new, total = query.shape[2], key.shape[2]
    if (pattern.new, pattern.total) != (new, total):
        _say("a mask of other positions than the keys")
        return None
    if (update := update_of(key, value)) is not None:
        if pattern.ends is not None and update.seen > 0:
            _say("padding after a sequence that goes on")
            return None
        begins = pattern.begins or [0] * len(query)
        if not update.fits(begins):
            _say("a mask that shows or hides what the cache has already taken otherwise")
            return None
        update.write(begins)
        return update.attend(query, options)
    if new != total or query.shape[-1] != value.shape[-1] or query.dtype not in _DTYPES:
        if pattern.causal:
            _say("a past that does not come from an int8 cache as it is")
        return None
    config = getattr(module, "config", None)
    kind = "int8" if config is None else kv_kind(config, getattr(module, "layer_idx", None))
    return _without_past(query, key, value, pattern, options, kind)


def _without_past(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: MaskPattern,
    options: AttentionOptions,
    kind: KvKind,
) -> Tensor:
    """Return attention over the keys and values of the call alone."""
    batch, kv_heads, total, channels = key.shape
    begins = pattern.begins or [0] * batch
    ends = pattern.ends or [total] * batch
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    pages = [-(-length // PAGE_TOKENS) for length in lengths]
    first = [sum(pages[:i]) for i in range(batch)]
    tables = [list(range(start, start + count)) for start, count in zip(first, pages, strict=True)]
    rows = call_rows(lengths, lengths, tables, begins, total)
    pool = KvPages(max(1, sum(pages)), kv_heads, channels, kind)
    pool.append(rows.rows, rows.take(key), rows.take(value))
    return rows.put_back(pool.attend(rows.rows, rows.take(query), options))


def _added(
    mask: Tensor | None,
    pattern: MaskPattern | None,
    query: Tensor,
    key: Tensor,
    position_bias: Tensor | None,
) -> Tensor | None:
    """Return what is added to the scores."""
    new, total = query.shape[2], key.shape[2]
    low = torch.finfo(query.dtype).min
    if mask is None and pattern is not None and pattern.causal:
        distance = torch.arange(total) - torch.arange(total - new, total)[:, None]
        hidden = distance > 0
        if pattern.window:
            hidden |= distance <= -pattern.window
        mask = torch.zeros((new, total), dtype=query.dtype).masked_fill(hidden, low)
    elif mask is not None:
        mask = mask[..., :total]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, low)
    if position_bias is None:
        return mask
    return position_bias if mask is None else position_bias + mask


def _in_floats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Return exact attention [batch, new, heads, channels] and its weights."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1)
        scores = torch.cat((scores, sink.expand(*scores.shape[:3], 1)), dim=3)
    weights = scores.softmax(dim=3, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _say(reason: str) -> None:
    warnings.warn(f"attention is computed in floats: {reason}", stacklevel=3)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, make_mask)
