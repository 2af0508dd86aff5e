"""Rows of a packed weight as floats: an embedding that shares its weight with a model's head."""

from __future__ import annotations

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core, torch_ops
from sq_cpu.kernels.ops import FLOATS, empty, is_dense, is_plain

__all__ = ["gather_rows"]

_IDS = (torch.int64, torch.int32)


def gather_rows(
    ids: Tensor,
    packed: Tensor,
    out_features: int,
    in_features: int,
    inverse_smoothing: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows of a packed weight [out_features, in_features], divided by a smoothing scale.

    Parameters
    ----------
    ids : int64 or int32 [...], each in [0, out_features)
    packed : uint8, as `PackedWeight` has it
    inverse_smoothing : 1 / s, fp32 [in_features]; None: ones
    dtype : fp32, bf16 or fp16, of the result [..., in_features]

    Raises
    ------
    SqCpuError
        For ids that the weight has no row for, and for other dtypes and devices.
    """
    if not isinstance(ids, Tensor) or not isinstance(packed, Tensor):
        raise SqCpuError("int8 embedding: ids and the packed weight are tensors")
    if dtype not in FLOATS:
        raise SqCpuError(f"int8 embedding: dtype is {dtype}; use float32, bfloat16 or float16")
    if not (is_dense(ids) and is_dense(packed)) or ids.dtype not in _IDS:
        raise SqCpuError(f"int8 embedding: ids are {ids.dtype}; use int64 or int32, dense")
    if not (ids.is_cpu and packed.is_cpu):
        raise SqCpuError(
            f"int8 embedding: ids are on {ids.device}, the weight on {packed.device}; "
            "sq_cpu runs on the CPU only"
        )
    if not is_plain(ids):
        if not torch.compiler.is_compiling():  # the tracer cannot follow the check
            torch_ops.check_packed("embedding: ids are", ids, packed, out_features, in_features)
        return torch_ops.call(
            torch.ops.sq_cpu.gather_rows.default,
            ids,
            packed,
            out_features,
            in_features,
            inverse_smoothing,
            torch_ops.RESULT_TYPES[dtype],
        )
    return _gather(ids, packed, out_features, in_features, inverse_smoothing, dtype)


def _gather(
    ids: Tensor,
    packed: Tensor,
    out_features: int,
    in_features: int,
    inverse_smoothing: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y = empty((*ids.shape, in_features), dtype)
    ids = ids.to(torch.int64).contiguous()
    _core.gather_rows(packed, out_features, in_features, inverse_smoothing, ids, y)
    return y
