"""The Hadamard transform in plain torch: the same bits as the kernels'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError

__all__ = ["BLOCK", "check_hadamard", "fwht64", "hadamard", "rotated", "whole_blocks"]

BLOCK = 64
"""Columns that one matrix mixes where activations are quantized: a tile of K."""


_AT_ONCE = 1 << 18  # elements


def check_hadamard(size: object) -> None:
    """Raise `SqCpuError` unless the kernels rotate blocks of so many columns; 0: none."""
    if type(size) is not int or size not in (0, BLOCK):
        raise SqCpuError(f"hadamard is {size!r}; blocks are of {BLOCK} columns, or 0: none")


def hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply each `size` of the last dimension, a power of two, by the Hadamard matrix.

    It is the one of ones and minus ones in natural order: twice gives x times `size`. Butterflies
    a + b, a - b run at strides 1, 2, 4, ..., which fixes the bits.
    """
    shape, half = x.shape, 1
    while half < size:
        a, b = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        half *= 2
    return x


def whole_blocks(columns: int) -> int:
    """Return `columns` rounded up to whole blocks: what `fwht64` gives."""
    return -(-columns // BLOCK) * BLOCK


def fwht64(x: Tensor) -> Tensor:
    """Multiply each 64 of the last dimension by the orthonormal Hadamard matrix.

    An outlier spreads over its block, and a linear of both x and W rotated alike is unchanged
    (QuaRot, arXiv 2404.00456, section 4). Twice gives x.

    Parameters
    ----------
    x : floating point [..., columns]; padded with zeros to whole blocks

    Returns
    -------
    [..., whole_blocks(columns)], of x's dtype
    """
    return rotated(x, BLOCK)


def rotated(x: Tensor, size: int) -> Tensor:
    """Do what `fwht64` does, in blocks of `size` columns, a power of two."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    norm = math.sqrt(size)  # of 64: 8, exact
    if x.numel() <= _AT_ONCE or (x.requires_grad and torch.is_grad_enabled()):
        return hadamard(x, size) / norm
    # A large weight in pieces: the butterflies would hold it three times.
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = max(1, _AT_ONCE // x.shape[-1])
    parts = (torch.split(each.flatten(0, -2), rows) for each in (made, x))
    for to, part in zip(*parts, strict=True):
        torch.div(hadamard(part, size), norm, out=to)
    return made
