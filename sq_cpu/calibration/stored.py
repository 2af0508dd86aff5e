"""What the tensors of a calibration's file may be, so that whatever uses them can rely on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError

__all__ = ["FOLDS", "check_tensors"]

FOLDS = 4
"""Parts that the batches are dealt into: a search is scored on a part that it did not see."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FP32, _FOLD, _PLACE = (torch.float32,), (torch.uint8,), (torch.int64,)

# By kind: the dtypes, and the sizes, of which those of one letter are equal for one linear.
_LAYOUT: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "channel_min": (_FP32, "K"),
    "channel_max": (_FP32, "K"),
    "fold_min": (_FP32, "FK"),
    "fold_max": (_FP32, "FK"),
    "rows": (_FLOATS, "RK"),
    "row_folds": (_FOLD, "R"),
    "row_places": (_PLACE, "R"),
    "peaks": (_FLOATS, "PK"),
    "peak_folds": (_FOLD, "P"),
    "gradient_rows": (_FLOATS, "GK"),
    "gradients": (_FLOATS, "GN"),
    "gradient_weights": (_FP32, "G"),
    "gradient_folds": (_FOLD, "G"),
    "gradient_places": (_PLACE, "G"),
}
# Where one linear has a kind, all that have the first of these have it; files of earlier versions
# lack some kinds.
_TOGETHER = (
    ("channel_min", "channel_max", "fold_min", "fold_max", "rows", "row_folds", "row_places"),
    ("channel_min", "peaks", "peak_folds"),
    ("gradient_rows", "gradients", "gradient_weights", "gradient_folds", "gradient_places"),
)
_NEEDED = ("channel_max", "gradients", "gradient_weights")


def check_tensors(kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise `SqCpuError` for tensors, by kind and linear, that no calibration can have."""
    for first, *others in _TOGETHER:
        for kind in others:
            is_optional = not kinds[kind] and kind not in _NEEDED
            if not is_optional and kinds[kind].keys() != kinds[first].keys():
                raise SqCpuError(f"{first} and {kind} are not of the same linears")
    if unknown := sorted(kinds["gradient_rows"].keys() - kinds["channel_min"].keys()):
        raise SqCpuError(f"gradients of {unknown[0]}, which has no ranges")
    for name in kinds["channel_min"]:
        sizes = {"F": FOLDS}
        for kind, (dtypes, letters) in _LAYOUT.items():
            if name in kinds[kind]:
                _check(f"{kind} of {name}", kinds[kind][name], dtypes, letters, sizes)
        low, high = kinds["channel_min"][name], kinds["channel_max"][name]
        if not (low.isfinite().all() and high.isfinite().all() and (low <= high).all()):
            raise SqCpuError(f"the ranges of {name} are none")


def _check(
    what: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    letters: str,
    sizes: dict[str, int],
) -> None:
    if tensor.dtype not in dtypes or tensor.dim() != len(letters):
        raise SqCpuError(f"{what} is {tensor.dtype} {list(tensor.shape)}")
    for letter, size in zip(letters, tensor.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise SqCpuError(f"{what} has the shape {list(tensor.shape)}, unlike its others")
    if tensor.isnan().any():
        raise SqCpuError(f"{what} has NaN")
    if dtypes is _FOLD and bool((tensor >= FOLDS).any()):
        raise SqCpuError(f"{what} has other parts than 0 to {FOLDS - 1}")
    if dtypes is _PLACE and bool((tensor < 0).any()):
        raise SqCpuError(f"{what} has negative places")
