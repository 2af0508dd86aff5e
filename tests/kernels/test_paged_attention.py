"""Int8 attention over pages against plain attention in float64, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.paged_attention import (
    PAGE_TOKENS,
    AttentionOptions,
    BatchRows,
    KvKind,
    KvPages,
    attend_reference,
    rotated_heads,
)


def pages_for(*lengths: int) -> list[list[int]]:
    """Return pages of sequences, dealt out in turns and downwards."""
    counts = [math.ceil(length / PAGE_TOKENS) for length in lengths]
    free = list(range(sum(counts)))
    return [[free.pop() for _ in range(count)] for count in counts]


def tokens(count: int, heads: int, head_dim: int, seed: int) -> Tensor:
    return torch.randn(count, heads, head_dim, generator=torch.Generator().manual_seed(seed))


OPTIONS = {
    "causal": AttentionOptions(scale=0.125),
    "bidirectional": AttentionOptions(scale=0.125, causal=False),
    "window": AttentionOptions(scale=0.125, window=50),
    "softcap": AttentionOptions(scale=0.3, softcap=2.0),
    "alibi": AttentionOptions(scale=0.125, slopes=2.0 ** -torch.arange(1, 7)),
    "sinks": AttentionOptions(scale=0.125, sinks=torch.linspace(-2, 2, 6)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("head_dim", "before", "new"), [(64, 0, 150), (80, 100, 1), (128, 63, 3)])
def test_near_plain_attention(name: str, head_dim: int, before: int, new: int) -> None:
    options = OPTIONS[name]
    length = before + new
    tables = pages_for(length)
    cache = KvPages(len(tables[0]), 2, head_dim)
    q, k, v = (
        tokens(new, 6, head_dim, 1),
        tokens(length, 2, head_dim, 2),
        tokens(length, 2, head_dim, 3),
    )
    cache.append(BatchRows([length], [length], tables), k, v)
    y = cache.attend(BatchRows([new], [length], tables), q, options)
    expected = attend_reference(q, k, v, options, before)
    # Each of q, k, v and p is rounded to some 1 / 127 or 1 / 255 of its largest element.
    assert (y - expected).square().mean().sqrt() < 0.012
    assert y.dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_cut_and_batch_give_the_same_bits(dtype: torch.dtype, kind: KvKind) -> None:
    lengths = (200, 5, 300)
    q, k, v = (
        [tokens(n, heads, 64, seed + i).to(dtype) for i, n in enumerate(lengths)]
        for heads, seed in ((4, 1), (2, 20), (2, 40))
    )
    options = AttentionOptions(scale=0.125)
    alone = []
    for i, length in enumerate(lengths):
        tables = pages_for(length)
        cache = KvPages(len(tables[0]), 2, 64, kind)
        rows = BatchRows([length], [length], tables)
        cache.append(rows, k[i], v[i])
        alone.append(cache.attend(rows, q[i], options))
    tables = pages_for(*lengths)
    cache = KvPages(sum(map(len, tables)), 2, 64, kind)
    pieces: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for step in (7, 64, 1, 100, 1, 200):
        new = [min(step, length - seen) for length, seen in zip(lengths, done, strict=True)]
        parts = [slice(seen, seen + n) for seen, n in zip(done, new, strict=True)]
        done = [seen + n for seen, n in zip(done, new, strict=True)]
        rows = BatchRows(new, done, tables)
        cache.append(rows, *(torch.cat([x[i][parts[i]] for i in range(3)]) for x in (k, v)))
        y = cache.attend(rows, torch.cat([q[i][parts[i]] for i in range(3)]), options)
        for piece, part in zip(pieces, y.split(new), strict=True):
            piece.append(part)
    for piece, expected in zip(pieces, alone, strict=True):
        assert torch.equal(torch.cat(piece), expected)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 96, 128])
def test_read_gives_back_what_was_appended(head_dim: int) -> None:
    k, v = tokens(150, 3, head_dim, 1), tokens(150, 3, head_dim, 2)
    tables = pages_for(150)
    cache = KvPages(3, 3, head_dim)
    cache.append(BatchRows([150], [150], tables), k, v)
    keys, values = cache.read(tables[0], 150)
    for read, given in ((keys, rotated_heads(k.transpose(0, 1))), (values, v.transpose(0, 1))):
        given = rotated_heads(given) / (head_dim & -head_dim) if read is keys else given
        step = given.abs().amax(dim=-1, keepdim=True) / 127
        # A key's rounding is spread over its block: at most sqrt(block) / 2 steps in one channel.
        steps = 0.5 if read is values else math.sqrt(head_dim & -head_dim)
        assert ((read - given).abs() <= steps * step + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 20, 64, 96, 128])
def test_bf16_pages_hold_what_was_appended(head_dim: int, dtype: torch.dtype) -> None:
    k, v = (tokens(150, 3, head_dim, seed).to(dtype) for seed in (1, 2))
    k[:, :, ::7] *= 1000  # outliers take nothing from the others
    tables = pages_for(150)
    cache = KvPages(3, 3, head_dim, "bf16")
    cache.append(BatchRows([150], [150], tables), k, v)
    for read, given in zip(cache.read(tables[0], 150), (k, v), strict=True):
        assert torch.equal(read, given.bfloat16().float().transpose(0, 1))


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_a_value_beyond_the_range_of_bf16_is_inf_in_its_pages_alone(kind: KvKind) -> None:
    k, v = tokens(3, 1, 64, 1), tokens(3, 1, 64, 2)
    v[1, 0, 5] = 3.4e38
    cache = KvPages(1, 1, 64, kind)
    rows = BatchRows([3], [3], [[0]])
    cache.append(rows, k, v)
    y = cache.attend(rows, tokens(3, 1, 64, 3), AttentionOptions(scale=0.125))
    finite = y.isfinite().flatten(1).all(dim=1)
    assert finite.tolist() == [True, kind == "int8", kind == "int8"]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("head_dim", "before", "new"), [(64, 0, 150), (80, 100, 1), (128, 63, 3)])
def test_bf16_pages_are_near_plain_attention(
    name: str, head_dim: int, before: int, new: int
) -> None:
    options = OPTIONS[name]
    length = before + new
    tables = pages_for(length)
    cache = KvPages(len(tables[0]), 2, head_dim, "bf16")
    q = tokens(new, 6, head_dim, 1)
    k, v = (tokens(length, 2, head_dim, seed).bfloat16() for seed in (2, 3))
    cache.append(BatchRows([length], [length], tables), k, v)
    y = cache.attend(BatchRows([new], [length], tables), q, options)
    expected = attend_reference(q, k, v, options, before)
    # head_dim products of some 4 in a score, rounded to 2^-24 each; and exp's 2.9e-6.
    assert (y - expected).abs().max() < 2e-5


def test_views_and_copied_pages() -> None:
    whole = tokens(70, 3 * 6, 64, 1).transpose(0, 1).contiguous().transpose(0, 1)
    q, k, v = whole.split(6, dim=1)
    tables = [[0, 1]]
    cache = KvPages(4, 6, 64)
    rows = BatchRows([70], [70], tables)
    cache.append(rows, k, v)
    y = cache.attend(rows, q, AttentionOptions(scale=0.125))
    for source, target in ((0, 3), (1, 2)):
        cache.copy_page(source, target)
    moved = cache.attend(BatchRows([70], [70], [[3, 2]]), q, AttentionOptions(scale=0.125))
    assert torch.equal(moved, y)


def test_planted_outliers_of_keys_cost_little() -> None:
    """Two channels of the keys 32 times as large, of the queries 32 times as small."""
    q, k, v = tokens(64, 1, 64, 1), tokens(64, 1, 64, 2), tokens(64, 1, 64, 3)
    options = AttentionOptions(scale=0.125)
    expected = attend_reference(q, k, v, options)
    q[..., [3, 40]] /= 32
    k[..., [3, 40]] *= 32
    cache = KvPages(1, 1, 64)
    rows = BatchRows([64], [64], [[0]])
    cache.append(rows, k, v)
    # Without the rotation 0.026.
    assert (cache.attend(rows, q, options) - expected).square().mean().sqrt() < 0.015


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KvPages(0, 1, 64), "0 pages"),
        (lambda: KvPages(1, 1, 1025), "head of 1025"),
        (lambda: KvPages(1, 1, 64, "fp8"), "pages of 'fp8'; they are of int8 or bf16"),  # type: ignore[arg-type]
        (lambda: BatchRows([1], [1], []), "0 page tables"),
        (lambda: BatchRows([2], [1], [[0]]), "1 tokens, 2 of them new"),
        (lambda: BatchRows([1], [65], [[0]]), "in 1 pages"),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(SqCpuError, match=message):
        call()  # type: ignore[operator]


def test_refused_operands() -> None:
    cache = KvPages(1, 2, 64)
    rows = BatchRows([1], [1], [[0]])
    good = tokens(1, 2, 64, 1)
    options = AttentionOptions(scale=0.125)
    for bad in (good.double(), good[:, :1], good.to("meta"), tokens(1, 2, 128, 1)[..., ::2]):
        with pytest.raises(SqCpuError, match="v is "):
            cache.append(rows, good, bad)
    with pytest.raises(SqCpuError, match="page 3 of a cache of 1"):
        cache.append(BatchRows([1], [1], [[3]]), good, good)
    cache.append(rows, good, good)
    with pytest.raises(SqCpuError, match="multiple of 2"):
        cache.attend(rows, tokens(1, 3, 64, 1), options)
    with pytest.raises(SqCpuError, match="slopes"):
        cache.attend(rows, good, AttentionOptions(scale=1.0, slopes=torch.ones(3)))
    with pytest.raises(SqCpuError, match="no gradient"):
        cache.attend(rows, good.requires_grad_(), options)
