"""Attention over keys and values that lie in pages, in int8, or in floats where they are bf16.

A page holds 64 tokens of one layer and kv head as int8, with a scale for each token, in the layout
of the kernels; cpp/include/sq_cpu/attention.h draws it and defines the arithmetic. Keys and queries
are multiplied by a Hadamard matrix first (QuaRot, arXiv 2404.00456, section 4), which leaves their
products and evens out their channels. A row's result has the same bits however its sequence was cut
into calls, and whatever else is in the batch. `attend_reference` is what it approximates. A layer
whose keys int8 would spoil has pages of bf16 and sums of floats, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.hadamard import hadamard
from sq_cpu.kernels.ops import empty, is_dense

__all__ = [
    "PAGE_TOKENS",
    "AttentionOptions",
    "BatchRows",
    "KvKind",
    "KvPages",
    "attend_reference",
    "page_bytes",
]

PAGE_TOKENS: int = _core.PAGE_TOKENS
KvKind = Literal["int8", "bf16"]
"""What keys and values are kept in: int8, scaled for each token and kv head, or bf16."""
_TYPES: dict[str, _core.KvType] = {"int8": _core.KvType.int8, "bf16": _core.KvType.bfloat16}


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What `KvPages.attend` does beside softmax(scale * q @ k.T) @ v."""

    scale: float
    """Of the scores, mostly head_dim ** -0.5."""
    causal: bool = True
    """A token sees those up to itself; else all of its sequence."""
    window: int = 0
    """Of them it sees the last so many; 0: all."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); 0: none."""
    slopes: Tensor | None = None
    """fp32 [heads]; slope * (key - query) is added to a score (ALiBi, arXiv 2108.12409)."""
    sinks: Tensor | None = None
    """fp32 [heads]: a score beside the keys', which has no value (gpt-oss)."""


class BatchRows:
    """Which rows of a call belong to which sequence, and in which pages that lies.

    Parameters
    ----------
    new : tokens of each sequence that the call brings; they are the last ones of it
    lengths : tokens of each sequence, the new ones among them
    tables : pages of each sequence: its token j lies in page tables[i][j // 64]

    Raises
    ------
    SqCpuError
        For lists of different lengths, a sequence with fewer tokens than new ones or fewer pages
        than tokens, and a page that no cache has.
    """

    def __init__(
        self, new: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> None:
        if not len(new) == len(lengths) == len(tables):
            raise SqCpuError(
                f"{len(new)} sequences with {len(lengths)} lengths and {len(tables)} page tables"
            )
        for i, (count, length, table) in enumerate(zip(new, lengths, tables, strict=True)):
            if not 0 <= count <= length or len(table) * PAGE_TOKENS < length:
                raise SqCpuError(
                    f"sequence {i} has {length} tokens, {count} of them new, in {len(table)} pages "
                    f"of {PAGE_TOKENS}"
                )
            if table and not 0 <= min(table) <= max(table) < 2**31:
                raise SqCpuError(f"sequence {i} has page {min(table)} or {max(table)}")
        self.rows = sum(new)
        stride = max(map(len, tables), default=0)
        self.tensors = (
            torch.tensor([0, *new], dtype=torch.int64, device="cpu").cumsum(0),
            torch.tensor(lengths, dtype=torch.int64, device="cpu"),
            torch.tensor(
                [[*table, *[0] * (stride - len(table))] for table in tables],
                dtype=torch.int32,
                device="cpu",
            ).reshape(len(tables), stride),
        )
        """first_row, length, table: what the extension takes."""


class KvPages:
    """The pages of one layer.

    Parameters
    ----------
    count : pages
    kv_heads, head_dim : of a token's keys, and of its values
    kind : of keys and values: "int8" with a scale for each token and head, or "bf16"

    Raises
    ------
    SqCpuError
        For a number that is not positive, a head of more than 1024 channels, another kind, and
        more pages than there is memory for.
    """

    def __init__(self, count: int, kv_heads: int, head_dim: int, kind: KvKind = "int8") -> None:
        if min(count, kv_heads, head_dim) < 1:
            raise SqCpuError(
                f"{count} pages of {kv_heads} kv heads of {head_dim} channels: each is at least 1"
            )
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.kind = kind
        size = page_bytes(head_dim, kind)
        self.type = _TYPES[kind]
        """`kind`, as the extension names it."""
        # Not zeroed: the operating system gives a page of memory when it is first written.
        self._pages = empty((count, kv_heads, size), torch.uint8)

    @property
    def tensor(self) -> Tensor:
        """Return the pages themselves, uint8 [count, kv_heads, bytes of a page]."""
        return self._pages

    @property
    def count(self) -> int:
        """Return how many pages there are."""
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all pages, written or not."""
        return self._pages.nbytes

    def append(self, rows: BatchRows, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the new tokens.

        Parameters
        ----------
        rows : what each row is
        k, v : fp32, bf16 or fp16 [rows, kv_heads, head_dim], any strides of row and head

        Raises
        ------
        SqCpuError
            For other shapes, dtypes and devices, and a page that there is not.
        """
        k, v = _dense("k", k), _dense("v", v)
        _core.append(self._pages, self.head_dim, self.type, *rows.tensors, k, v)

    def attend(self, rows: BatchRows, q: Tensor, options: AttentionOptions) -> Tensor:
        """Return the attention of the new tokens over all tokens of their sequences.

        Parameters
        ----------
        rows : what each row is; its tokens have been appended
        q : fp32, bf16 or fp16 [rows, heads, head_dim], any strides of row and head; heads is a
            multiple of kv_heads

        Returns
        -------
        q's dtype [rows, heads, head_dim]; a row with NaN or Inf, or that sees one, is NaN

        Raises
        ------
        SqCpuError
            For other shapes, dtypes and devices, options that are not finite, and a page that there
            is not.
        """
        q = _dense("q", q)
        if not q.is_cpu or q.dim() != 3 or q.shape[0] != rows.rows or q.shape[2] != self.head_dim:
            raise SqCpuError(
                f"paged attention: q is {list(q.shape)} on {q.device}, "
                f"not [{rows.rows}, heads, {self.head_dim}] on cpu"
            )
        y = empty(tuple(q.shape), q.dtype)
        _core.attention(
            self._pages,
            self.head_dim,
            self.type,
            *rows.tensors,
            q,
            options.scale,
            options.causal,
            options.window,
            options.softcap,
            None if options.slopes is None else _dense("slopes", options.slopes).contiguous(),
            None if options.sinks is None else _dense("sinks", options.sinks).contiguous(),
            y,
        )
        return y

    def read(self, table: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a sequence, dequantized.

        Parameters
        ----------
        table : its pages
        length : its tokens

        Returns
        -------
        fp32 [kv_heads, length, head_dim] each; the keys rotated back

        Raises
        ------
        SqCpuError
            For a page that there is not, and fewer pages than tokens.
        """
        self._check(table)
        if not 0 <= length <= len(table) * PAGE_TOKENS:
            raise SqCpuError(f"{length} tokens in {len(table)} pages of {PAGE_TOKENS}")
        pages = self._pages[torch.tensor(table, dtype=torch.int64)]  # [pages, kv_heads, bytes]
        width = math.ceil(self.head_dim / 16) * 16
        head = pages.shape[:2]
        if self.kind == "bf16":
            sizes = [PAGE_TOKENS * 2 * self.head_dim, PAGE_TOKENS * 2 * width]
            sizes.append(pages.shape[2] - sum(sizes))
            k, v, _ = torch.split(pages, sizes, dim=2)
            # [strip, channel, token], [tile, token, channel]
            keys = k.contiguous().view(torch.bfloat16).reshape(*head, 4, self.head_dim, 16)
            values = v.contiguous().view(torch.bfloat16).reshape(*head, width // 16, -1, 16)
            keys = keys.transpose(3, 4).flatten(2, 3).float()
            values = values.transpose(2, 3).flatten(3)[..., : self.head_dim].float()
            keys, values = (x.transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values))
            return keys, values
        depth = math.ceil(self.head_dim / 64) * 64
        sizes = [PAGE_TOKENS * depth, PAGE_TOKENS * width, *[PAGE_TOKENS * 4] * 3]
        k, v, k_scale, v_scale, _ = torch.split(pages, sizes, dim=2)
        # [strip, tile, group, token, 4 channels], [tile, group, channel, 4 tokens]: linear.h
        keys = k.view(torch.int8).reshape(*head, 4, depth // 64, 16, 16, 4)
        keys = keys.permute(0, 1, 2, 5, 3, 4, 6).reshape(*head, PAGE_TOKENS, depth)
        values = v.view(torch.int8).reshape(*head, width // 16, 16, 16, 4)
        values = values.permute(0, 1, 3, 5, 2, 4).reshape(*head, PAGE_TOKENS, width)

        def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
            scales = scale.contiguous().view(torch.float32)[..., None]
            x = codes[..., : self.head_dim].float() * scales
            return x.transpose(0, 1).flatten(1, 2)[:, :length]

        return rotated_heads(dequantized(keys, k_scale)) / _block(self.head_dim), dequantized(
            values, v_scale
        )

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source`; `SqCpuError` where there is no such page."""
        self._check((source, target))
        self._pages[target] = self._pages[source]

    def grow(self, count: int) -> None:
        """Make it `count` pages, the present ones first; `SqCpuError` for fewer or no memory."""
        if count < self.count:
            raise SqCpuError(f"{count} pages are fewer than the {self.count} that there are")
        pages = empty((count, *self._pages.shape[1:]), torch.uint8)
        pages[: self.count] = self._pages
        self._pages = pages

    def _check(self, pages: Sequence[int]) -> None:
        for page in pages:
            if not 0 <= page < self.count:
                raise SqCpuError(f"page {page} of {self.count}")


def page_bytes(head_dim: int, kind: KvKind = "int8") -> int:
    """Return the bytes of a page of one kv head; `SqCpuError` for heads and kinds there are not."""
    if kind not in get_args(KvKind):
        raise SqCpuError(f"pages of {kind!r}; they are of {' or '.join(get_args(KvKind))}")
    return _core.page_bytes(head_dim, _TYPES[kind])


def rotated_heads(x: Tensor) -> Tensor:
    """Multiply the last dimension by `hadamard`, in blocks of the largest power of two in it."""
    return hadamard(x, _block(x.shape[-1]))


def _block(head_dim: int) -> int:
    return head_dim & -head_dim


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, before: int = 0
) -> Tensor:
    """Compute attention of one sequence in plain torch and float64, without int8.

    Parameters
    ----------
    q : [new, heads, head_dim], of tokens `before` and later
    k, v : [tokens, kv_heads, head_dim]

    Returns
    -------
    float64 [new, heads, head_dim]
    """
    group = q.shape[1] // k.shape[1]
    q = q.double().transpose(0, 1)
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = torch.arange(k.shape[1]) - torch.arange(before, before + q.shape[1])[:, None]
    if options.slopes is not None:
        scores = scores + options.slopes.double()[:, None, None] * distance
    hidden = distance > 0 if options.causal else torch.zeros_like(distance, dtype=torch.bool)
    if options.window:
        hidden = hidden | (distance <= -options.window)
    scores = scores.masked_fill(hidden, -math.inf)
    if options.sinks is not None:
        sink = options.sinks.double()[:, None, None].expand(-1, q.shape[1], 1)
        scores = torch.cat((scores, sink), dim=2)
    weights = scores.softmax(dim=2)[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1)


def _dense(name: str, x: Tensor) -> Tensor:
    if not is_dense(x):
        raise SqCpuError(f"paged attention: {name} is sparse or nested; use a dense tensor")
    if x.requires_grad and torch.is_grad_enabled():
        raise SqCpuError("paged attention has no gradient: call it under torch.no_grad()")
    return x.resolve_neg()
