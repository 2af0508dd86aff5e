"""Memory that is asked back: what the allocator keeps, and pages of mapped files."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

from torch import Tensor

__all__ = ["page_out", "trim"]


def trim() -> None:
    """Give back what the allocator keeps of freed pieces, where the C library can."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_MADV_PAGEOUT = 21  # Linux 5.4; leaves the contents as they are, unlike MADV_DONTNEED


def page_out(tensor: Tensor) -> None:
    """Ask for the pages of a mapped tensor back; they are read again when they are needed."""
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
    if length > 0:
        address, size = ctypes.c_void_p(begin), ctypes.c_size_t(length)
        with suppress(AttributeError):
            ctypes.CDLL(None).madvise(address, size, _MADV_PAGEOUT)
