"""The two products of attention in int8: `matmul_qk` gives the scores, `matmul_pv` the output.

With q, k, v in int8 (scales sq, sk, sv), and the probabilities P in uint8 (scale 1/255):

    S = (q @ k.T) * (sq * sk / sqrt(head_dim))        P = round(255 * softmax(S))
    O = (P @ v) * (sv / 255)

A scale may also stand for each row of the left operand and for each column of the result:

    y[i, j] = float32(sum over k of a[i, k] * b[k, j]) * (a_scale[i] * (scale * b_scale[j]))

in fp32, rounded once to the output's dtype; int8 is clamp(round(y), -127, 127) and int32 the sums
themselves. Query heads share the kv head of their group (grouped-query attention). torch-int calls
these products BMM_S8T_S8N_F32T and BMM_S8T_S8N_S8T (SmoothQuant, arXiv 2211.10438).
`matmul_reference` defines the results; the kernels give them bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core, torch_ops
from sq_cpu.kernels.ops import empty, is_dense, is_plain

__all__ = ["matmul_pv", "matmul_qk", "matmul_reference"]

_OUT_DTYPES = {
    torch.float32: _core.BatchedType.float32,
    torch.bfloat16: _core.BatchedType.bfloat16,
    torch.float16: _core.BatchedType.float16,
    torch.int32: _core.BatchedType.int32,
    torch.int8: _core.BatchedType.int8,
}


def matmul_qk(
    q: Tensor,
    k: Tensor,
    scale: float = 1.0,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return q @ k.T, scaled: the scores of every query with every key.

    Parameters
    ----------
    q : int8 [batch, heads, queries, head_dim], any strides of batch, head and row
    k : int8 [batch, kv_heads, keys, head_dim], likewise; heads is a multiple of kv_heads
    scale : of all results, e.g. sq * sk / sqrt(head_dim)
    q_scale : fp32 [batch, heads, queries], per query, besides
    k_scale : fp32 [batch, kv_heads, keys], per key, besides
    out_dtype : float32, bfloat16, float16, int32 (the sums; takes no scale) or int8

    Returns
    -------
    out_dtype [batch, heads, queries, keys]

    Raises
    ------
    SqCpuError
        For other dtypes, shapes that do not fit, a scale that is not finite, and head_dim > 65793,
        where an int32 sum could overflow.
    """
    return _matmul(q, k, True, scale, q_scale, k_scale, out_dtype)


def matmul_pv(
    p: Tensor,
    v: Tensor,
    scale: float = 1.0,
    *,
    p_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return p @ v, scaled: the values weighted by the probabilities.

    Parameters
    ----------
    p : uint8 (or int8) [batch, heads, queries, keys], any strides of batch, head and row
    v : int8 [batch, kv_heads, keys, head_dim], likewise; heads is a multiple of kv_heads
    scale : of all results, e.g. sv / 255
    p_scale : fp32 [batch, heads, queries], per query, besides: what normalizes a row of P
    v_scale : fp32 [batch, kv_heads, head_dim], per channel, besides. A scale per key must be
        multiplied into the probabilities before they are quantized.
    out_dtype : float32, bfloat16, float16, int32 (the sums; takes no scale) or int8

    Returns
    -------
    out_dtype [batch, heads, queries, head_dim]

    Raises
    ------
    SqCpuError
        For other dtypes, shapes that do not fit, a scale that is not finite, and more than 65793
        keys, where an int32 sum could overflow.
    """
    return _matmul(p, v, False, scale, p_scale, v_scale, out_dtype)


def matmul_reference(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    scale: float = 1.0,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute in plain torch exactly what the kernels compute: `matmul_qk` when `transposed`."""
    b = b.mT if transposed else b
    b = b.repeat_interleave(a.shape[1] // max(b.shape[1], 1), dim=1)
    total = a.double() @ b.double()  # integers up to 2^31 and their products are exact in fp64
    if out_dtype == torch.int32:
        return total.to(torch.int32)
    scales = torch.tensor(scale, dtype=torch.float32)
    if b_scale is not None:
        scales = scales * b_scale.repeat_interleave(b.shape[1] // b_scale.shape[1], dim=1)
        scales = scales[:, :, None, :]
    if a_scale is not None:
        scales = scales * a_scale[..., None]
    y = (total.float().double() * scales.double() + 0.0).float()
    if out_dtype == torch.int8:
        y = y.nan_to_num(-127.0).round().clamp(-127, 127)
    return y.to(out_dtype)


def _matmul(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    scale: float,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(a, b, transposed, scale, a_scale, b_scale, out_dtype)
    if all(is_plain(x) for x in (a, b, a_scale, b_scale) if x is not None):
        return _run(a, b, transposed, scale, a_scale, b_scale, out_dtype)
    return torch_ops.call(
        torch.ops.sq_cpu.batched_matmul.default,
        a,
        b,
        transposed,
        scale,
        a_scale,
        b_scale,
        torch_ops.RESULT_TYPES[out_dtype],
    )


def _run(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    scale: float,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    batch, heads, m, _ = a.shape
    n = b.shape[2 if transposed else 3]
    a, b = _rows_contiguous(a), _rows_contiguous(b)
    a_scale = None if a_scale is None else a_scale.resolve_neg().contiguous()
    b_scale = None if b_scale is None else b_scale.resolve_neg().contiguous()
    y = empty((batch, heads, m, n), out_dtype)
    _core.batched_matmul(a, b, transposed, scale, a_scale, b_scale, y, _OUT_DTYPES[out_dtype])
    return y


def _rows_contiguous(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x if x.stride(3) == 1 or x.shape[3] <= 1 else x.contiguous()


def _check(
    a: Tensor,
    b: Tensor,
    transposed: bool,
    scale: float,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    product = "int8 q @ k.T" if transposed else "int8 p @ v"
    for x in (a, b, a_scale, b_scale):
        if x is not None and not is_dense(x):
            raise SqCpuError(f"{product}: an operand is sparse or nested; use a dense tensor")
    lefts = (torch.int8,) if transposed else (torch.uint8, torch.int8)
    if a.dtype not in lefts or b.dtype != torch.int8 or out_dtype not in _OUT_DTYPES:
        left = " or ".join(str(dtype) for dtype in lefts)
        raise SqCpuError(
            f"{product}: {a.dtype} by {b.dtype} to {out_dtype}; use {left} by torch.int8 to "
            "float32, bfloat16, float16, int32 or int8"
        )
    inner, n = (3, 2) if transposed else (2, 3)
    fits = a.dim() == b.dim() == 4 and a.shape[0] == b.shape[0] and a.shape[3] == b.shape[inner]
    if not fits or (a.shape[1] % b.shape[1] if b.shape[1] else a.shape[1]):
        second = "[batch, kv_heads, keys, head_dim]"
        first = "[batch, heads, queries, " + ("head_dim]" if transposed else "keys]")
        raise SqCpuError(
            f"{product}: {list(a.shape)} by {list(b.shape)} do not fit; use {first} by {second}, "
            "heads a multiple of kv_heads"
        )
    if a.shape[3] > _core.MAX_DEPTH:
        raise SqCpuError(
            f"{product}: sums of {a.shape[3]} products exceed {_core.MAX_DEPTH}, beyond "
            "which int32 can overflow; split them and add the parts"
        )
    for given, shape in ((a_scale, a.shape[:3]), (b_scale, (*b.shape[:2], b.shape[n]))):
        if given is not None and (given.dtype != torch.float32 or given.shape != shape):
            raise SqCpuError(
                f"{product}: a scale is {given.dtype} {list(given.shape)}, "
                f"not torch.float32 {list(shape)}"
            )
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            raise SqCpuError(f"{product} has no gradient: call it under torch.no_grad()")
    if not math.isfinite(scale):
        raise SqCpuError(f"{product}: scale is {scale}; it must be finite")
    if out_dtype == torch.int32 and not (scale == 1.0 and a_scale is None and b_scale is None):
        raise SqCpuError(f"{product}: int32 results are the plain sums; leave the scales out")
    for x in (a, b, a_scale, b_scale):
        if x is not None and not x.is_cpu:
            raise SqCpuError(f"{product}: an operand is on {x.device}; sq_cpu runs on the CPU only")
