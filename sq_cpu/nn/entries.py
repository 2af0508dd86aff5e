"""What an int8 linear's state_dict has, known before the layer is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sq_cpu.kernels.hadamard import whole_blocks
from sq_cpu.scheme import Scheme

__all__ = ["Entries", "found_entries", "linear_entries", "unknown_keys", "weight_columns"]

Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype."""


def weight_columns(in_features: int, hadamard: int) -> int:
    """Return the columns of an int8 weight: whole blocks where they are rotated."""
    return whole_blocks(in_features) if hadamard and in_features > 0 else in_features


def linear_entries(
    in_features: int,
    out_features: int,
    scheme: Scheme,
    *,
    bias: bool,
    smoothed: bool,
    hadamard: int = 0,
) -> Entries:
    """Return the shape and dtype of each entry of a `QuantLinear`'s state_dict."""
    entries: Entries = {
        "weight": ((out_features, weight_columns(in_features, hadamard)), torch.int8),
        "weight_scale": ((out_features,), torch.float32),
    }
    if bias:
        entries["bias"] = ((out_features,), torch.float32)
    if scheme.activations == "static":
        entries |= {"input_scale": ((), torch.float32), "input_zero_point": ((), torch.int32)}
    if smoothed:
        entries["smoothing"] = ((in_features,), torch.float32)
    if hadamard:
        # Whole blocks of columns alone would not tell a rotated weight from another.
        entries["hadamard"] = ((), torch.int32)
    return entries


def found_entries(
    entries: Entries,
    state_dict: Mapping[str, Any],
    prefix: str,
    missing: list[str],
    errors: list[str],
) -> dict[str, Tensor]:
    """Return those of a layer's entries that fit; note the others as torch's loading does."""
    found: dict[str, Tensor] = {}
    for name, (shape, dtype) in entries.items():
        tensor = state_dict.get(prefix + name)
        if tensor is None:
            missing.append(prefix + name)
        elif tuple(tensor.shape) != shape or tensor.dtype != dtype:
            errors.append(
                f"{prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the layer needs {dtype} {shape}"
            )
        else:
            found[name] = tensor
    return found


def unknown_keys(entries: Entries, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the keys with a layer's prefix that are none of its entries."""
    return [
        key
        for key in state_dict
        if key.startswith(prefix) and key.removeprefix(prefix) not in entries
    ]
