"""Packed weights side by side, in huge pages."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from sq_cpu.nn.linear import QuantLinear
from sq_cpu.nn.packed_weight import untouched_pages

__all__ = ["gather_weights"]

_HUGE_PAGE = 2 << 20
_GROUP = 64 << 20
"""Bytes that are moved at once, and so exist twice meanwhile."""

_gathered: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""By id: what another order of the same layers must not move again, under a program of theirs."""


def gather_weights(layers: Iterable[QuantLinear]) -> None:
    """Move the weights of layers next to each other, in their order, into huge pages.

    A weight of a megabyte has 256 small pages, each a miss of the TLB and an end to what the
    processor fetches ahead. Those that were gathered, that processes share or that are larger stay
    where they are. A layer gets a new tensor: who holds the old one, a call on another thread, may
    go on reading it.
    """
    group: list[QuantLinear] = []
    size = 0
    for layer in dict.fromkeys(layers):
        if not _stays(layer.packed):
            if size + layer.packed.nbytes > _GROUP:
                _gather(group, size)
                group, size = [], 0
            group.append(layer)
            size += layer.packed.nbytes
    _gather(group, size)


def _stays(packed: Tensor) -> bool:
    return (
        packed.nbytes > _GROUP
        or packed.untyped_storage().is_shared()
        or _gathered.get(id(packed), None) is packed
    )


@torch.inference_mode(False)
def _gather(layers: list[QuantLinear], size: int) -> None:
    if size < 2 * _HUGE_PAGE:
        return
    pages = untouched_pages(size + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    for layer in layers:
        count = layer.packed.nbytes
        # Of a storage of its own: pickle writes whole storages.
        moved = torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=begin)
        layer.packed = moved.copy_(layer.packed)
        _gathered[id(layer.packed)] = layer.packed
        begin += count
