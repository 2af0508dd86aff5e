"""The mixed-precision decomposition of LLM.int8() (arXiv 2208.07339), with this library's kernels.

Input channels with outliers stay in float, the others are int8, and the two products are added:

    y = Q(X_r) Q(W_r)^T + X_o W_o^T + bias

The paper looks for outliers in each batch; here they are found once, by calibration or by `tune`,
so that W_o is the only float copy of any weight. SmoothQuant keeps every channel int8; but a
massive activation (arXiv 2402.17762), which one channel has at a few tokens, hundreds of times the
others', takes the range of either the static scale or the weights that it is smoothed into.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import ops
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.nn.reference import linear_reference
from sq_cpu.scheme import Scheme

__all__ = ["DecomposedLinear", "decomposed_reference"]

# The smoothing scale that hides a channel from its row's absmax: 1 / 2^126 is the least normal
# number, so what is left of |x| < 2^100 is below 2^-26. Its code meets a weight of 0.
_HIDDEN = 2.0**126


def decomposed_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    outlier_weight: Tensor,
    scheme: Scheme,
    static: tuple[float, int] | None = None,
    *,
    smoothing: Tensor | None = None,
    hadamard: int = 0,
) -> Tensor:
    """Compute in plain torch what `DecomposedLinear` computes.

    It may differ where a float product X_o W_o^T is not exact: its sum is rounded to x's dtype once
    here, and as torch adds it up there.

    Parameters
    ----------
    x : fp32, bf16 or fp16 [..., in_features]
    weight : int8 [out_features, in_features], or with whole blocks of columns (`hadamard`)
    weight_scale, bias : fp32 [out_features]
    columns : int64 [outliers], the channels in float
    outlier_weight : floating point [out_features, outliers]
    static : (scale, zero point) of a static scheme's activations, from `static_code`
    smoothing : s, fp32 [in_features]; the other channels are multiplied by 1 / s first
    hadamard : 64 where blocks of so many of these are rotated then, else 0

    Returns
    -------
    [..., out_features], of x's dtype; NaN in a row that is not finite
    """
    outliers = x[..., columns].double() @ outlier_weight.to(x.dtype).double().T
    finite = x.isfinite().all(dim=-1, keepdim=True)
    outliers = torch.where(finite, outliers, torch.nan).to(x.dtype)
    rest = x.index_fill(-1, columns, 0)
    return linear_reference(
        rest,
        weight,
        weight_scale,
        bias,
        scheme,
        static,
        smoothing=smoothing,
        hadamard=hadamard,
        residual=outliers,
    )


class DecomposedLinear(nn.Module):
    """A linear layer whose outlier channels are float and whose other channels are int8.

    Attributes
    ----------
    regular : QuantLinear whose weight is 0 in the outlier channels and whose smoothing scale hides
        their activations; it adds the float product in its epilogue
    columns : int64 buffer [outliers], the outlier channels, ascending
    outlier_weight : floating-point buffer [out_features, outliers], which `.to(dtype)` casts
    """

    columns: Tensor
    outlier_weight: Tensor

    def __init__(self, regular: QuantLinear, columns: Tensor, outlier_weight: Tensor) -> None:
        """Put the parts together; `from_float` makes them, `empty` those of a layer to load."""
        super().__init__()
        self.regular = regular
        self.register_buffer("columns", columns)
        self.register_buffer("outlier_weight", outlier_weight)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        columns: Tensor,
        input_range: tuple[float, float] | None = None,
        *,
        smoothing: Tensor | None = None,
        weight_clip: float = 1.0,
        hadamard: int = 0,
    ) -> DecomposedLinear:
        """Quantize `linear` but for its input channels `columns`, int64 and ascending.

        `input_range` is, for a static scheme, that of the channels that are quantized, smoothed.
        `smoothing` is s, [in_features], of the channels that are quantized: the weight is
        multiplied by it, the input will be divided. Entries for outlier channels are not used.
        `weight_clip` and `hadamard` are those of `QuantLinear.from_float`, for the int8 channels.

        Raises
        ------
        SqCpuError
            When the columns are not ascending channels, when a weight is not finite, and where
            `QuantLinear.from_float` does.
        """
        _check_columns(columns, linear.in_features)
        weight = linear.weight.detach()
        outlier_weight = weight[:, columns].contiguous()
        if not outlier_weight.isfinite().all():
            raise SqCpuError("a weight holds NaN or Inf: quantize a sound checkpoint")
        rest = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        rest.weight = nn.Parameter(weight.index_fill(1, columns, 0), requires_grad=False)
        rest.bias = linear.bias
        if smoothing is None:
            smoothing = torch.ones(linear.in_features, dtype=torch.float32, device="cpu")
        hiding = smoothing.detach().float().index_fill(0, columns, _HIDDEN)
        regular = QuantLinear.from_float(
            rest,
            scheme,
            input_range,
            smoothing=hiding,
            weight_clip=weight_clip,
            hadamard=hadamard,
        )
        return cls(regular, columns.clone(), outlier_weight)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        outliers: int,
        *,
        bias: bool,
        hadamard: int = 0,
    ) -> DecomposedLinear:
        """Allocate a layer of zeros, for `load_state_dict` to fill; `scheme` must be resolved."""
        regular = QuantLinear(
            in_features, out_features, scheme, bias=bias, smoothed=True, hadamard=hadamard
        )
        columns = torch.zeros(outliers, dtype=torch.int64, device="cpu")
        weight = torch.zeros(out_features, outliers, dtype=torch.float32, device="cpu")
        return cls(regular, columns, weight)

    @property
    def in_features(self) -> int:
        """Input channels, outliers included."""
        return self.regular.in_features

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.regular.out_features

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, no values (see `QuantLinear.weight`)."""
        return self.regular.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear names it
        """Return y [..., out_features] for `input` [..., in_features], both fp32, bf16 or fp16.

        The float product is rounded to that dtype, then added in fp32. Raises `SqCpuError` as
        `QuantLinear.forward` does.
        """
        ops.check(input, self.regular.packed, self.in_features)
        outlier_weight = self.outlier_weight.to(input.dtype)
        outliers = nn.functional.linear(input[..., self.columns], outlier_weight)
        return self.regular(input, residual=outliers)  # type: ignore[no-any-return]

    def reference(self, x: Tensor) -> Tensor:
        """Return what `forward` returns, computed in plain torch by `decomposed_reference`."""
        return decomposed_reference(
            x,
            self.regular.weight_int8(),
            self.regular.weight_scale,
            self.regular.bias,
            self.columns,
            self.outlier_weight,
            self.regular.scheme,
            self.regular.static,
            smoothing=self.regular.smoothing,
            hadamard=self.regular.hadamard,
        )

    def check(self) -> None:
        """Raise `SqCpuError` unless the columns are those that the int8 part leaves out."""
        smoothing = self.regular.smoothing
        assert smoothing is not None  # both constructors give one
        if not torch.equal(self.columns, (smoothing == _HIDDEN).nonzero().flatten()):
            raise SqCpuError("columns are not those that smoothing hides: save the model again")

    @property
    def nbytes(self) -> int:
        """Resident bytes: the int8 part, the float columns and their numbers."""
        return self.regular.nbytes + self.columns.nbytes + self.outlier_weight.nbytes

    def extra_repr(self) -> str:
        """Return the number of float columns, for `print(model)`."""
        return f"outliers={len(self.columns)}"


def _check_columns(columns: Tensor, in_features: int) -> None:
    flat = columns.dtype == torch.int64 and columns.dim() == 1
    if not flat or columns.tolist() != sorted({*columns.tolist()} & {*range(in_features)}):
        raise SqCpuError(f"outlier columns are ascending channels, int64, of {in_features}")
