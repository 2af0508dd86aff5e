"""What an int8 linear's state_dict has, known before the layer is made."""

from __future__ import annotations

import torch

from sq_cpu.scheme import Scheme

__all__ = ["Entries", "linear_entries"]

Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype."""


def linear_entries(
    in_features: int, out_features: int, scheme: Scheme, *, bias: bool, smoothed: bool
) -> Entries:
    """Return the shape and dtype of each entry of a `QuantLinear`'s state_dict."""
    entries: Entries = {
        "weight": ((out_features, in_features), torch.int8),
        "weight_scale": ((out_features,), torch.float32),
    }
    if bias:
        entries["bias"] = ((out_features,), torch.float32)
    if scheme.activations == "static":
        entries |= {"input_scale": ((), torch.float32), "input_zero_point": ((), torch.int32)}
    if smoothed:
        entries["smoothing"] = ((in_features,), torch.float32)
    return entries
