"""The kernels as functions of tensors: checked calls, quantized activations.

The names are those of cpp/include/sq_cpu/linear.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.kernels import _core
from sq_cpu.kernels.hadamard import check_hadamard, fwht64, whole_blocks

__all__ = [
    "ACTIVATION_KINDS",
    "FLOATS",
    "Activation",
    "Epilogue",
    "QuantizedActivation",
    "check",
    "empty",
    "is_dense",
    "is_plain",
    "linear",
    "linear_quantized",
    "linear_requantized",
    "make_quantizer",
    "needs_gradient",
    "quantize_activations",
    "reciprocals",
    "refuse_gradient",
]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]

_DTYPES = {
    torch.float32: _core.DType.float32,
    torch.bfloat16: _core.DType.bfloat16,
    torch.float16: _core.DType.float16,
}
FLOATS = tuple(_DTYPES)
"""What int8 layers take and give; so also of what a float linear may be."""
_ACTIVATIONS = {None: _core.Activation.none} | {
    name: getattr(_core.Activation, name) for name in get_args(Activation)
}
_CODES = {name: int(activation) for name, activation in _ACTIVATIONS.items()}
ACTIVATION_KINDS = {
    "per_token": (_core.Granularity.per_token, 1),
    "per_token_x2": (_core.Granularity.per_token, 2),
    "per_tensor": (_core.Granularity.per_tensor, 1),
    "static": (_core.Granularity.static, 1),
}
"""Granularity of the scale, and terms, of `Scheme.activations`."""
_NO_STEPS = (_core.Activation.none, None, None)

_NO_GRADIENT = "quantized activations have no gradient: call the model under torch.no_grad()"


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """Activations [*leading, in_features] as u8 codes, ready for several int8 linears.

    Row i of the m rows of codes stands for (codes - zero_point[i]) * scale[i]. Where the quantizer
    has two terms, each two rows add up to one of the activations.
    """

    codes: Tensor
    """uint8 [codes_bytes(m, in_features)], in the blocks that cpp/include/sq_cpu/linear.h draws."""
    scale: Tensor
    """fp32 [m]; NaN for a row that is not finite."""
    zero_point: Tensor
    """int32 [m]."""
    leading: tuple[int, ...]
    """The shape without the last dimension; m is its product times the quantizer's terms."""
    in_features: int
    dtype: torch.dtype
    """What it was quantized from, and what a linear makes of it: fp32, bf16 or fp16."""
    quantizer: _core.ActivationQuantizer
    """How it was quantized; a layer takes what its own quantizer could have made."""

    def __post_init__(self) -> None:
        """Raise `SqCpuError` for parts that are not of one m."""
        if not all(isinstance(size, int) and size >= 0 for size in self.leading):
            raise SqCpuError(f"quantized activations: leading is {self.leading}, not a shape")
        m = math.prod(self.leading) * self.terms
        for name, dtype, size in (
            ("codes", torch.uint8, _core.codes_bytes(m, self.in_features)),
            ("scale", torch.float32, m),
            ("zero_point", torch.int32, m),
        ):
            part = getattr(self, name)
            readable = part.is_cpu and is_dense(part)
            if not readable or part.dtype != dtype or part.shape != (size,):
                raise SqCpuError(
                    f"quantized activations: {name} is {_describe(part)}, not {dtype} [{size}] "
                    f"on cpu for [{m}, {self.in_features}]"
                )
        if self.dtype not in _DTYPES:
            raise SqCpuError(
                f"quantized activations: dtype is {self.dtype}; use float32, bfloat16 or float16"
            )

    @property
    def max_code(self) -> int:
        """The largest code there is: 255, or 127 with `reduce_range`."""
        return self.quantizer.max_code

    @property
    def terms(self) -> int:
        """Rows of codes that add up to one row: 1, or 2."""
        return self.quantizer.terms

    def rows(self) -> Tensor:
        """Return the codes in row-major order, uint8 [m, in_features], or those of whole blocks."""
        m, k = len(self.scale), self._columns
        height, tiles = max(1, min(16, m)), -(-k // 64)
        blocks = self.codes.view(-(-m // height), tiles, height, 64).transpose(1, 2)
        return blocks.reshape(-1, tiles * 64)[:m, :k]

    def dequantize(self) -> Tensor:
        """Return the activations, [*leading, in_features] of `dtype`, as far as 8 bits hold them.

        They are those that were quantized, thus divided by the smoothing scale if there was one;
        a rotation by Hadamard is undone.
        """
        centred = self.rows().int() - self.zero_point[:, None]
        x = (centred * self.scale[:, None]).view(-1, self.terms, self._columns).sum(dim=1)
        if self.quantizer.hadamard:
            x = fwht64(x)[:, : self.in_features]
        return x.to(self.dtype).view(*self.leading, self.in_features)

    @property
    def _columns(self) -> int:
        k = self.in_features
        return whole_blocks(k) if self.quantizer.hadamard else k


def make_quantizer(
    activations: str,
    symmetric: bool,
    reduce_range: bool,
    scale: float,
    zero_point: int,
    smoothing: Tensor | None,
    hadamard: int = 0,
    dynamic_fallback: bool = False,
) -> _core.ActivationQuantizer:
    """Return the kernels' quantizer of a scheme; `smoothing` is s, fp32 [in_features].

    `hadamard` is 64 where blocks of so many columns are rotated then (`fwht64`), else 0; where
    scales are not static, `dynamic_fallback` (see `Scheme`) has no effect.

    Raises
    ------
    SqCpuError
        When s or 1 / s is not positive and finite, and for a static scale or zero point that no
        grid has, or another size of blocks.
    """
    check_hadamard(hadamard)
    if activations not in ACTIVATION_KINDS:
        raise SqCpuError(
            f"activations are quantized {', '.join(ACTIVATION_KINDS)}; not {activations!r}"
        )
    if not -(2**63) <= zero_point < 2**63:
        raise SqCpuError(f"static zero point is {zero_point}; codes are 0 .. 255")
    granularity, terms = ACTIVATION_KINDS[activations]
    return _core.ActivationQuantizer(
        granularity,
        symmetric,
        reduce_range,
        scale,
        zero_point,
        () if smoothing is None else reciprocals(smoothing).tolist(),
        terms,
        hadamard,
        dynamic_fallback and activations == "static",
    )


def reciprocals(smoothing: Tensor) -> Tensor:
    """Return 1 / s, fp32 [in_features], of s; `SqCpuError` unless they are positive and finite."""
    if not (smoothing.is_cpu and smoothing.is_floating_point() and smoothing.dim() == 1):
        raise SqCpuError(
            f"the smoothing scale is {_describe(smoothing)}; use floats [in_features] on cpu"
        )
    try:
        reciprocal = 1 / smoothing
        if not ((reciprocal > 0) & (reciprocal < math.inf)).all():
            raise SqCpuError("a smoothing scale or its reciprocal is not positive and finite")
        reciprocal.tolist()  # raises where a tensor has no values of its own
        return reciprocal.float()
    except RuntimeError as error:  # sparse, fake or transformed
        raise SqCpuError(f"the smoothing scale cannot be read: {first_line(error)}") from error


def _describe(x: Tensor) -> str:
    if not is_dense(x):
        return f"sparse or nested {x.dtype}"
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def is_dense(x: Tensor) -> bool:
    """Tell whether `x` is an array of its shape, neither sparse nor nested."""
    return x.layout == torch.strided and not x.is_nested


def is_plain(x: object) -> bool:
    """Tell whether `x` is a tensor that nothing traces, transforms or differentiates forward."""
    return not torch.compiler.is_compiling() and _core.is_plain(x)


def needs_gradient(*tensors: object) -> bool:
    """Tell whether a call with these arguments, None among them, is recorded for a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )


class Epilogue(NamedTuple):
    """What follows a linear's sum v, in this order: activation(v) * other + residual."""

    activation: str | None = None
    other: Tensor | None = None
    residual: Tensor | None = None

    def check(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise `SqCpuError` unless it is one for an output of this shape and dtype."""
        if self.activation not in _ACTIVATIONS:
            raise SqCpuError(
                f"int8 linear: activation is {self.activation!r}, known are "
                + ", ".join(get_args(Activation))
            )
        for name, operand in (("other", self.other), ("residual", self.residual)):
            if operand is not None:
                _check_operand(name, operand, shape, dtype)

    def checked(self, shape: tuple[int, ...], dtype: torch.dtype) -> Epilogue:
        """Return it with operands that the kernels can read."""
        self.check(shape, dtype)
        operands = [x for x in (self.other, self.residual) if x is not None]
        refuse_gradient(*operands)
        other, residual = (
            None if operand is None else operand.resolve_neg().contiguous()
            for operand in (self.other, self.residual)
        )
        return Epilogue(self.activation, other, residual)

    def code(self) -> int:
        """Return the number of the activation, as cpp/include/sq_cpu/linear.h counts them."""
        return _CODES[self.activation]

    def arguments(self) -> tuple[_core.Activation, Tensor | None, Tensor | None]:
        """Return what the bindings take."""
        return _ACTIVATIONS[self.activation], self.other, self.residual


def _check_operand(name: str, operand: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    readable = operand.is_cpu and is_dense(operand)
    if not readable or tuple(operand.shape) != shape or operand.dtype != dtype:
        raise SqCpuError(
            f"int8 linear: {name} is {_describe(operand)}, the output {dtype} {list(shape)} on cpu"
        )


def check(
    x: Tensor, packed: Tensor, in_features: int, operands: Iterable[Tensor] = ()
) -> list[int]:
    """Return `leading` of an x [*leading, in_features] that the kernels take; else `SqCpuError`."""
    _check_input(x)
    operands = list(operands)
    _refuse_tangents(x, *operands)
    *leading, width = x.shape or (-1,)
    if width != in_features:
        raise SqCpuError(
            f"int8 linear: input is {list(x.shape)}, the layer needs [..., {in_features}]"
        )
    if not (x.is_cpu and packed.is_cpu):
        raise SqCpuError(
            f"int8 linear: input is on {x.device}, weights on {packed.device}; "
            "sq_cpu runs on the CPU only"
        )
    for each in (packed, *operands):
        if not is_dense(each):
            raise SqCpuError(f"int8 linear: an operand is {_describe(each)}; use a dense tensor")
    return leading


def refuse_gradient(*tensors: Tensor) -> None:
    """Raise `SqCpuError` where a gradient of these is asked for."""
    if needs_gradient(*tensors):
        raise SqCpuError(_NO_GRADIENT)


def _refuse_tangents(*tensors: Tensor) -> None:
    """Raise `SqCpuError` for forward-mode derivatives, which would come out as zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    unpack_dual: Any = forward_ad.unpack_dual
    if any(unpack_dual(x).tangent is not None for x in tensors):
        raise SqCpuError(
            "int8 linear has no forward-mode derivative (jvp): use gradients (vjp, grad)"
        )


def _check_input(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise SqCpuError(f"int8 linear: input is {x.dtype}; use float32, bfloat16 or float16")
    if not is_dense(x):
        raise SqCpuError("int8 linear: input is sparse or nested; use a dense tensor")


def linear(
    x: Tensor,
    packed: Tensor,
    in_features: int,
    out_features: int,
    quantizer: _core.ActivationQuantizer,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Return y [..., out_features] of x's dtype, for a plain x."""
    leading = check(x, packed, in_features)
    refuse_gradient(x)
    if x.is_neg():
        x = x.resolve_neg()
    x = x.contiguous()
    y = empty((*leading, out_features), x.dtype)
    if epilogue is not None:
        epilogue = epilogue.checked(tuple(y.shape), y.dtype)
    activation, other, residual = _NO_STEPS if epilogue is None else epilogue.arguments()
    arguments = (x, packed, out_features, in_features, quantizer, y, activation, other, residual)
    if not profiler._is_profiler_enabled:
        _core.linear(*arguments)
    else:  # the name that the operator has
        with profiler.record_function("sq_cpu::linear"):
            _core.linear(*arguments)
    return y


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a new tensor on the CPU; `SqCpuError` where there is no memory for it."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    except (RuntimeError, TypeError) as error:
        raise SqCpuError(f"there is no memory for {dtype} {list(shape)}") from error


def _empty_codes(
    leading: tuple[int, ...],
    in_features: int,
    dtype: torch.dtype,
    quantizer: _core.ActivationQuantizer,
) -> QuantizedActivation:
    m = math.prod(leading) * quantizer.terms
    codes, scale, zero_point = (
        empty((size,), kind)
        for size, kind in (
            (_core.codes_bytes(m, in_features), torch.uint8),
            (m, torch.float32),
            (m, torch.int32),
        )
    )
    return QuantizedActivation(codes, scale, zero_point, leading, in_features, dtype, quantizer)


def quantize_activations(x: Tensor, quantizer: _core.ActivationQuantizer) -> QuantizedActivation:
    """Quantize x [..., in_features], a plain fp32, bf16 or fp16 tensor, as `linear` does."""
    _check_input(x)
    *leading, in_features = x.shape or (-1,)
    x = x.resolve_neg().contiguous()
    out = _empty_codes(tuple(leading), in_features, x.dtype, quantizer)
    _core.quantize_activations(x, in_features, quantizer, out.codes, out.scale, out.zero_point)
    return out


def linear_quantized(
    x: QuantizedActivation, packed: Tensor, out_features: int, epilogue: Epilogue
) -> Tensor:
    """Return what `linear` returns for what `x` was quantized from, bit for bit."""
    shape = (*x.leading, out_features)
    epilogue = epilogue.checked(shape, x.dtype)
    y = empty(shape, x.dtype)
    _core.linear_quantized(
        x.codes,
        x.scale,
        x.zero_point,
        x.max_code,
        x.terms,
        packed,
        out_features,
        x.in_features,
        y,
        *epilogue.arguments(),
    )
    return y


def linear_requantized(
    x: QuantizedActivation,
    packed: Tensor,
    out_features: int,
    quantizer: _core.ActivationQuantizer,
    epilogue: Epilogue,
) -> QuantizedActivation:
    """Return the codes of y by `quantizer`, which must be static, without rounding y before."""
    epilogue = epilogue.checked((*x.leading, out_features), x.dtype)
    y = _empty_codes(x.leading, out_features, x.dtype, quantizer)
    _core.linear_requantized(
        x.codes,
        x.scale,
        x.zero_point,
        x.max_code,
        x.terms,
        packed,
        out_features,
        x.in_features,
        quantizer,
        y.codes,
        y.scale,
        y.zero_point,
        _DTYPES[x.dtype],
        *epilogue.arguments(),
    )
    return y
