"""The int8 linear layer in plain torch: what the kernels' result is, bit for bit.

y = (codes - zero_point) @ weight.T * row_scale * weight_scale + bias
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sq_cpu.kernels.hadamard import fwht64
from sq_cpu.kernels.ops import Activation
from sq_cpu.numerics.rounding import quantize_rows
from sq_cpu.scheme import Scheme

__all__ = ["linear_reference"]


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
}


def linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    static: tuple[float, int] | None = None,
    *,
    smoothing: Tensor | None = None,
    hadamard: int = 0,
    activation: Activation | None = None,
    other: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute in plain torch exactly what the kernels compute.

    Of the activations only relu is exact: the others are rounded from fp64 here, while the kernels
    err by up to 3.5e-7 of the value.

    Parameters
    ----------
    x : fp32, bf16 or fp16 [..., in_features]
    weight : int8 [out_features, in_features], or with whole blocks of columns (`hadamard`)
    weight_scale, bias : fp32 [out_features]
    static : (scale, zero point) of a static scheme's activations, from `static_code`
    smoothing : s, fp32 [in_features]; x is multiplied by 1 / s first
    hadamard : 64 where blocks of so many columns are rotated then, else 0
    activation : "relu", "gelu", "gelu_tanh" or "silu"
    other, residual : multiplied and added after the activation, [..., out_features]

    Returns
    -------
    [..., out_features], of x's dtype
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if smoothing is not None:
        rows = rows * (1 / smoothing)
    if hadamard:
        rows = fwht64(rows)
    codes, row_scale, zero_point = quantize_rows(rows, scheme, static)
    # Integers up to 2^31 and their products are exact in fp64.
    total = (codes.double() - zero_point.double()[:, None]) @ weight.double().T
    product = total.float().double() * (row_scale[:, None] * weight_scale).double()
    terms = product.reshape(len(rows), scheme.terms, len(weight))
    y = torch.zeros_like(weight_scale) if bias is None else bias
    for term in reversed(terms.unbind(dim=1)):  # the last and least one first
        y = (term + y.double()).float()
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    if activation is not None:
        y = _ACTIVATIONS[activation](y.double()).float()
    if other is not None:
        y = y * other.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
