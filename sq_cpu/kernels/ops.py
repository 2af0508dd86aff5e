"""The kernels as functions of tensors: checked calls, quantized activations, the torch operator.

The names are those of cpp/include/sq_cpu/linear.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.kernels import _core
from sq_cpu.kernels.hadamard import check_hadamard, fwht64, whole_blocks

__all__ = [
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
    "quantize_activations",
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
# Granularity of the scale, and terms.
_ACTIVATION_KINDS = {
    "per_token": (_core.Granularity.per_token, 1),
    "per_token_x2": (_core.Granularity.per_token, 2),
    "per_tensor": (_core.Granularity.per_tensor, 1),
    "static": (_core.Granularity.static, 1),
}
_NO_STEPS = (_core.Activation.none, None, None)

_NO_GRADIENT = "int8 linear has no gradient: call the model under torch.no_grad()"


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


# Per smoothing tensor, as long as it lives: its version, and the quantizers made of that.
_quantizers: MutableMapping[
    Tensor, tuple[int, dict[tuple[object, ...], _core.ActivationQuantizer]]
] = WeakTensorKeyDictionary()


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

    It is made once per smoothing tensor, as the traced operator asks for it at each call and 1 / s
    takes longer than a short product. A tensor that is changed in place gets a new one.

    Raises
    ------
    SqCpuError
        When s or 1 / s is not positive and finite, and for a static scale or zero point that no
        grid has, or another size of blocks.
    """
    check_hadamard(hadamard)
    if activations not in _ACTIVATION_KINDS:
        raise SqCpuError(
            f"activations are quantized {', '.join(_ACTIVATION_KINDS)}; not {activations!r}"
        )
    if not -(2**63) <= zero_point < 2**63:
        raise SqCpuError(f"static zero point is {zero_point}; codes are 0 .. 255")
    granularity, terms = _ACTIVATION_KINDS[activations]
    beside = (terms, hadamard, dynamic_fallback and activations == "static")
    settings = (granularity, symmetric, reduce_range, scale, zero_point)
    if smoothing is None:
        return _core.ActivationQuantizer(*settings, (), *beside)
    if smoothing.is_inference():  # such a tensor does not tell when it is changed
        return _core.ActivationQuantizer(*settings, _reciprocals(smoothing), *beside)
    version, made = _quantizers.get(smoothing, (None, {}))
    if version != smoothing._version:
        made = {}
        _quantizers[smoothing] = smoothing._version, made
    key = (*settings, *beside)
    if key not in made:
        made[key] = _core.ActivationQuantizer(*settings, _reciprocals(smoothing), *beside)
    return made[key]


def _reciprocals(smoothing: Tensor) -> list[float]:
    if not (smoothing.is_cpu and smoothing.is_floating_point() and smoothing.dim() == 1):
        raise SqCpuError(
            f"the smoothing scale is {_describe(smoothing)}; use floats [in_features] on cpu"
        )
    try:
        reciprocal = 1 / smoothing
        if not ((reciprocal > 0) & (reciprocal < math.inf)).all():
            raise SqCpuError("a smoothing scale or its reciprocal is not positive and finite")
        return reciprocal.tolist()
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
    """Tell whether `x` is an ordinary tensor that nothing traces or transforms."""
    return not torch.compiler.is_compiling() and _core.is_plain(x)


class Epilogue(NamedTuple):
    """What follows a linear's sum v, in this order: activation(v) * other + residual."""

    activation: str | None = None
    other: Tensor | None = None
    residual: Tensor | None = None

    def checked(self, shape: tuple[int, ...], dtype: torch.dtype) -> Epilogue:
        """Return it with operands that the kernels can read."""
        if self.activation not in _ACTIVATIONS:
            raise SqCpuError(
                f"int8 linear: activation is {self.activation!r}, known are "
                + ", ".join(get_args(Activation))
            )
        other, residual = (
            None if operand is None else _operand(name, operand, shape, dtype)
            for name, operand in (("other", self.other), ("residual", self.residual))
        )
        return Epilogue(self.activation, other, residual)

    def arguments(self) -> tuple[_core.Activation, Tensor | None, Tensor | None]:
        """Return what the bindings take."""
        return _ACTIVATIONS[self.activation], self.other, self.residual


def _operand(name: str, operand: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    readable = operand.is_cpu and is_dense(operand)
    if not readable or tuple(operand.shape) != shape or operand.dtype != dtype:
        raise SqCpuError(
            f"int8 linear: {name} is {_describe(operand)}, the output {dtype} {list(shape)} on cpu"
        )
    if operand.requires_grad and torch.is_grad_enabled():
        raise SqCpuError(_NO_GRADIENT)
    return operand.resolve_neg().contiguous()


def check(
    x: Tensor, packed: Tensor, in_features: int, operands: Iterable[Tensor] = ()
) -> list[int]:
    """Return `leading` of an x [*leading, in_features] that the kernels take; else `SqCpuError`."""
    _check_input(x)
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
    if x.requires_grad and torch.is_grad_enabled():
        raise SqCpuError(_NO_GRADIENT)
    return leading


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
    if x.is_neg():
        x = x.resolve_neg()
    x = x.contiguous()
    y = empty((*leading, out_features), x.dtype)
    if epilogue is not None:
        epilogue = epilogue.checked(tuple(y.shape), y.dtype)
    activation, other, residual = _NO_STEPS if epilogue is None else epilogue.arguments()
    _core.linear(x, packed, out_features, in_features, quantizer, y, activation, other, residual)
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


@torch.library.custom_op("sq_cpu::linear", mutates_args=(), device_types="cpu")
def _linear_op(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    activations: str,
    symmetric: bool,
    reduce_range: bool,
    scale: float,
    zero_point: int,
    smoothing: Tensor | None = None,
    activation: str | None = None,
    other: Tensor | None = None,
    residual: Tensor | None = None,
    hadamard: int = 0,
    dynamic_fallback: bool = False,
) -> Tensor:
    """Run the kernel where torch traces or transforms; plain calls go straight to `linear`."""
    _check_packed(x, packed, out_features)
    settings = (activations, symmetric, reduce_range, scale, zero_point)
    quantizer = make_quantizer(*settings, smoothing, hadamard, dynamic_fallback)
    epilogue = Epilogue(activation, other, residual)
    return linear(x, packed, x.shape[-1], out_features, quantizer, epilogue)


@_linear_op.register_fake
def _(x: Tensor, packed: Tensor, out_features: int, *_: Any, **__: Any) -> Tensor:
    _check_packed(x, packed, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _check_packed(x: Tensor, packed: Tensor, out_features: int) -> None:
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise SqCpuError(
            f"int8 linear: input is {x.dtype} of {x.dim()} dimensions; "
            "use float32, bfloat16 or float16, of one or more"
        )
    if x.device != packed.device:
        raise SqCpuError(f"int8 linear: input is on {x.device}, weights on {packed.device}")
    size = _core.packed_bytes(out_features, int(x.shape[-1]))
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != size:
        raise SqCpuError(
            f"int8 linear: {packed.numel()} elements of {packed.dtype} are not a packed weight "
            f"[{out_features}, {x.shape[-1]}], which takes {size} of uint8"
        )
