"""Which pages sequences lie in, and how many sequences use a page.

A page is one number in every layer, so that reordering, cropping and copying a batch is done once.
Sequences share pages that are full; one that is written is its sequence's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.paged_attention import PAGE_TOKENS, BatchRows, KvPages
from sq_cpu.kernels.runtime import available_memory

__all__ = [
    "CallRows",
    "PagePool",
    "PageTable",
    "call_rows",
    "pages_of",
    "pages_that_fit",
    "split_rows",
]

_FIRST_PAGES = 4
_RELEASED = -1


@dataclass(frozen=True)
class CallRows:
    """The new tokens of a call, as rows."""

    rows: BatchRows
    kept: Tensor | None
    """Which of the batch's rows [batch * new] are tokens, not padding; None: all."""
    batch: int

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens' rows of x [batch, heads, new, channels] as [rows, heads, channels]."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self.kept is None else rows[self.kept]

    def put_back(self, y: Tensor) -> Tensor:
        """Return rows of `take`'s shape as [batch, new, heads, channels]; padding is 0."""
        if self.kept is not None:
            whole = y.new_zeros(len(self.kept), *y.shape[1:])
            whole[self.kept] = y
            y = whole
        return y.reshape(self.batch, -1, *y.shape[1:])


def call_rows(
    counts: Sequence[int],
    lengths: Sequence[int],
    tables: Sequence[Sequence[int]],
    firsts: Sequence[int],
    new: int,
) -> CallRows:
    """Return the rows of a call of `new` positions, of which sequences have the first few not.

    Parameters
    ----------
    counts, lengths, tables : of `BatchRows`
    firsts : where each sequence's tokens begin within the call
    """
    kept = None
    if any(count != new for count in counts):
        begin, count = torch.tensor(firsts)[:, None], torch.tensor(counts)[:, None]
        position = torch.arange(new)
        kept = ((position >= begin) & (position < begin + count)).flatten()
    return CallRows(BatchRows(counts, lengths, tables), kept, len(counts))


def split_rows(
    call: CallRows, sequences: Sequence[int], tokens: int, new: int
) -> tuple[BatchRows, CallRows]:
    """Return the first tokens of some sequences, which a call begins, and the call without them.

    Parameters
    ----------
    call : of `new` positions
    sequences : which of the batch have so many `tokens` at least, and none before
    """
    first_row, length, table = call.rows.tensors
    counts, tables = first_row.diff().tolist(), table.tolist()
    each = [tokens] * len(sequences)
    first = BatchRows(each, each, [tables[sequence] for sequence in sequences])
    for sequence in sequences:
        counts[sequence] -= tokens
    firsts = [new - count for count in counts]
    return first, call_rows(counts, length.tolist(), tables, firsts, new)


class PagePool:
    """Numbers of pages, each used by some sequences or by none.

    A page that is full may be known by a key that tells all tokens up to its last. It is found by
    it as long as nobody needs its room.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._uses: list[int] = []
        self._free: list[int] = []
        self._keys: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Known pages that nobody uses, those that were released last at the end."""
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        """Return how many pages there are."""
        return len(self._uses)

    @property
    def available(self) -> int:
        """Return how many pages nobody uses."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Return how many pages are used."""
        return self.capacity - self.available

    def grow(self, capacity: int) -> None:
        """Make it so many pages, the present ones first."""
        # The lowest is taken first: memory that was never written costs nothing.
        self._free[:0] = reversed(range(self.capacity, capacity))
        self._uses.extend([0] * (capacity - self.capacity))

    def take(self) -> int | None:
        """Return a page that nobody uses, as used once; None where there is none."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._known[self._keys.pop(page)]
        else:
            return None
        self._uses[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count one more use of a page."""
        self._kept.pop(page, None)
        self._uses[page] += 1

    def is_shared(self, page: int) -> bool:
        """Tell whether several use a page."""
        return self._uses[page] > 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one use less of each; their room goes from the last to the first."""
        for page in reversed(pages):
            self._uses[page] -= 1
            if not self._uses[page]:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: bytes) -> None:
        """Let a full page be found by its key, unless another is."""
        if page not in self._keys and key not in self._known:
            self._keys[page] = key
            self._known[key] = page

    def find(self, key: bytes) -> int | None:
        """Return the page of this key."""
        return self._known.get(key)


class Member(Protocol):
    """A layer whose sequences lie in a table's pages."""

    pool: KvPages | None

    def flush(self) -> None:
        """Write what is not in the pages yet."""


class PageTable:
    """The pages of each sequence of a batch, for all layers that see alike.

    A sequence of a batch begins after its padding, `pads` positions, which no page holds. Positions
    count the padding, tokens do not.

    Parameters
    ----------
    window : a token sees the last so many; pages that no later token sees are released. 0: all
    """

    def __init__(self, window: int = 0) -> None:
        self.window = window
        self.keep_all = False
        """Whether pages outside of the window are kept, for a `crop` of any length."""
        self.members: list[Member] = []
        self.gathered = 0
        """How often `gather` was called."""
        self.pads: list[int] = []
        self._tables: list[list[int]] = []
        self._pool = PagePool()
        self._planned: tuple[int, int, CallRows] | None = None

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return len(self._tables)

    @property
    def capacity(self) -> int:
        """Return how many pages each layer has."""
        return self._pool.capacity

    @property
    def used(self) -> int:
        """Return how many pages hold tokens."""
        return self._pool.used

    def begin(self, batch: int) -> None:
        """Make room for so many sequences, all empty."""
        self._tables = [[] for _ in range(batch)]
        self.pads = [0] * batch
        self._grow(_FIRST_PAGES)

    def set_pads(self, pads: list[int]) -> None:
        """Say how many positions before each sequence are padding."""
        if pads != self.pads:
            self.pads = pads
            self._planned = None

    def plan(self, seen: int, new: int) -> CallRows:
        """Return the rows of `new` positions after `seen`, with pages of their own to write to."""
        if self._planned is not None and self._planned[:2] == (seen, new):
            return self._planned[2]
        begins = [max(0, seen - pad) for pad in self.pads]
        ends = [max(0, seen + new - pad) for pad in self.pads]
        for table, begin, end in zip(self._tables, begins, ends, strict=True):
            self._release_unseen(table, begin)
            self._make_own(table, begin, end)
        tables = [[max(page, 0) for page in table] for table in self._tables]
        counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
        firsts = [new - count for count in counts]
        self._planned = (seen, new, call_rows(counts, ends, tables, firsts, new))
        return self._planned[2]

    def gather(self, indices: Sequence[int]) -> None:
        """Make sequence i what sequence indices[i] was."""
        self._flush()
        self.gathered += 1
        tables = [list(self._tables[i]) for i in indices]
        for table in tables:
            for page in table:
                if page != _RELEASED:
                    self._pool.share(page)
        for table in self._tables:
            self._release(table)
        self._tables = tables
        self.pads = [self.pads[i] for i in indices]
        self._planned = None

    def crop(self, seen: int) -> None:
        """Keep the first `seen` positions; `SqCpuError` for more than the window has kept."""
        self._flush()
        for table, pad in zip(self._tables, self.pads, strict=True):
            tokens = max(0, seen - pad)
            if self.window and self._first_held(table) > max(0, tokens + 1 - self.window):
                raise SqCpuError(
                    f"crop to {seen} tokens: what a window of {self.window} sees there is gone; "
                    "call activate_past_recording() before the tokens that are to be removed"
                )
        for table, pad in zip(self._tables, self.pads, strict=True):
            pages = pages_of(max(0, seen - pad))
            self._release(table[pages:])
            del table[pages:]
        self._planned = None

    def read(self, pool: KvPages, seen: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions, dequantized; what no page holds is 0.

        Returns
        -------
        fp32 [batch, kv_heads, seen, head_dim] each
        """
        shape = (self.batch, pool.kv_heads, seen, pool.head_dim)
        keys, values = torch.zeros(shape), torch.zeros(shape)
        for i, (table, pad) in enumerate(zip(self._tables, self.pads, strict=True)):
            tokens, held = max(0, seen - pad), self._first_held(table)
            k, v = pool.read([max(page, 0) for page in table], tokens)
            keys[i, :, pad + held :] = k[:, held:]
            values[i, :, pad + held :] = v[:, held:]
        return keys, values

    def reset(self) -> None:
        """Release all pages, and the memory of them."""
        self.pads, self._tables, self._pool = [], [], PagePool()
        self.gathered, self._planned = 0, None

    def _flush(self) -> None:
        for member in self.members:
            member.flush()

    def _layers(self) -> Iterator[KvPages]:
        return (member.pool for member in self.members if member.pool is not None)

    def _make_own(self, table: list[int], begin: int, end: int) -> None:
        last = begin // PAGE_TOKENS
        if begin < end and begin % PAGE_TOKENS and self._pool.is_shared(table[last]):
            copy = self._take()
            for pool in self._layers():
                pool.copy_page(table[last], copy)
            self._pool.release(table[last : last + 1])
            table[last] = copy
        table.extend(self._take() for _ in range(pages_of(end) - len(table)))

    def _release_unseen(self, table: list[int], begin: int) -> None:
        """Release what tokens from `begin` on do not see, but for a page that a crop may need."""
        if not self.window or self.keep_all:
            return
        unseen = max(0, begin + 1 - self.window - PAGE_TOKENS) // PAGE_TOKENS
        self._release(table[:unseen])
        table[:unseen] = [_RELEASED] * unseen

    @staticmethod
    def _first_held(table: list[int]) -> int:
        """Return the first token that a page holds."""
        return sum(page == _RELEASED for page in table) * PAGE_TOKENS

    def _take(self) -> int:
        page = self._pool.take()
        if page is None:
            self._grow(2 * self.capacity)
            page = self._pool.take()
        assert page is not None
        return page

    def _grow(self, capacity: int) -> None:
        for layer in self._layers():
            layer.grow(capacity)
        self._pool.grow(capacity)

    def _release(self, pages: Sequence[int]) -> None:
        self._pool.release([page for page in pages if page != _RELEASED])


def pages_of(tokens: int) -> int:
    """Return how many pages hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


def pages_that_fit(page_bytes: int) -> int:
    """Return how many pages half of the available memory holds, at least one."""
    return max(1, available_memory() // 2 // page_bytes)
