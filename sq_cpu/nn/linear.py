"""The int8 linear layer: `QuantLinear` runs the kernels, `reference` defines their result.

Weights are int8 with one fp32 scale per output channel (or one for some rows, or for all, where the
scheme says so). Activations become u8 codes with one scale and zero point per row (SmoothQuant,
arXiv 2211.10438, eq. 1 and 2):

    y = (codes - zero_point) @ weight.T * row_scale * weight_scale + bias
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core, ops, torch_ops
from sq_cpu.kernels.hadamard import check_hadamard, fwht64
from sq_cpu.kernels.ops import Activation, Epilogue, QuantizedActivation
from sq_cpu.nn.entries import (
    Entries,
    found_entries,
    linear_entries,
    unknown_keys,
    weight_columns,
)
from sq_cpu.nn.packed_weight import PackedWeight
from sq_cpu.nn.quantizer import layer_quantizer, layer_settings, own_copy
from sq_cpu.nn.reference import linear_reference
from sq_cpu.numerics.rounding import quantize_weight, static_code
from sq_cpu.scheme import Scheme

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """A linear layer with int8 weights and int8 activations, for inference.

    The packed weight is the only resident copy: int8 tiles, column sums, scales and bias in one
    uint8 buffer, which `deepcopy`, pickling, `share_memory` and `.to(dtype)` carry along unchanged.
    `state_dict` unpacks it exactly, into `weight` (int8 [out_features, in_features]),
    `weight_scale` (fp32 [out_features]), `bias`, for static schemes `input_scale` and
    `input_zero_point`, and if any `smoothing` and `hadamard` (int32); `load_state_dict` packs all.

    Attributes
    ----------
    packed : uint8 buffer, laid out as cpp/include/sq_cpu/linear.h draws it
    dtype : of the float linear, or of the last `.to(dtype)`: what the model computes in here
    input_scale, input_zero_point : of a static scheme; None and 0 otherwise
    smoothing : s, fp32 [in_features], which divides the input (SmoothQuant, arXiv 2211.10438,
        eq. 3) while it is quantized; None where that was folded into the layer before
    hadamard : 64 where blocks of so many columns of X / s and W s are multiplied by the Hadamard
        matrix, which leaves their product and spreads outliers (QuaRot, arXiv 2404.00456); else 0.
        The int8 weight then has in_features rounded up to whole blocks.
    """

    packed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        smoothed: bool = False,
        hadamard: int = 0,
    ) -> None:
        """Allocate a layer of zeros, for `load_state_dict` to fill; `scheme` must be resolved."""
        check_hadamard(hadamard)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.scheme = scheme
        self.hadamard = hadamard
        self.dtype = torch.float32
        packed = PackedWeight.zeros(out_features, weight_columns(in_features, hadamard))
        self.register_buffer("packed", packed.buffer, persistent=False)
        static = None if scheme.activations != "static" else (1.0, scheme.zero_point)
        smoothing = torch.ones(in_features, dtype=torch.float32, device="cpu") if smoothed else None
        self._set_quantizer(static, smoothing)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        input_range: tuple[float, float] | None = None,
        *,
        smoothing: Tensor | None = None,
        weight_clip: float = 1.0,
        hadamard: int = 0,
    ) -> QuantLinear:
        """Quantize `linear`.

        Parameters
        ----------
        input_range : (min, max) of the layer's input, divided by `smoothing` and then rotated, for
            a static scheme
        smoothing : s, [in_features]: the weight is multiplied by it, the input will be divided
        weight_clip : fraction, in (0, 1], of each weight scale's absmax that the codes cover
        hadamard : 64 to rotate blocks of so many columns of both, or 0

        Raises
        ------
        SqCpuError
            When the weight is not finite, in_features exceeds 65793 (where an int32 sum could
            overflow), a static scheme has no input range, s is not positive and finite, or the
            clip is out of its range.
        """
        static = None
        if scheme.activations == "static":
            if input_range is None:
                raise SqCpuError("a static scheme needs the input's range: calibrate the model")
            static = static_code(scheme, *input_range)
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, scheme, bias=bias, hadamard=hadamard)
        layer.dtype = linear.weight.dtype
        smoothing = None if smoothing is None else own_copy(smoothing)
        layer._set_quantizer(static, smoothing)
        weight = linear.weight.detach()
        if smoothing is not None:
            weight = weight.float() * smoothing
        if hadamard:
            weight = fwht64(weight.float())
        layer.packed_weight.pack(
            *quantize_weight(weight, scheme.weights, scheme.rows_per_scale, weight_clip),
            None if linear.bias is None else linear.bias.detach(),
        )
        return layer

    def forward(
        self,
        input: Tensor | QuantizedActivation,  # noqa: A002  as nn.Linear names it
        *,
        activation: Activation | None = None,
        other: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return y [..., out_features] for `input` [..., in_features], both fp32, bf16 or fp16.

        Parameters
        ----------
        input : a tensor, or what `quantize_input` of this layer or of one that quantizes alike gave
        activation : "relu", "gelu" (by erf), "gelu_tanh" or "silu"
        other, residual : [..., out_features] of y's dtype; y = activation(v) * other + residual,
            each step in fp32 and the result rounded once

        Raises
        ------
        SqCpuError
            For another dtype, shape or device, and for an input that was quantized otherwise than
            this layer does.

        Where gradients are asked for they pass straight through the rounding to the input, `other`
        and `residual`: dx = (dy * weight_scale) @ weight / s. The layer itself has none.
        """
        packed: Any = self._buffers["packed"]  # self.packed takes nn.Module's long way
        steps = None
        if activation is not None or other is not None or residual is not None:
            steps = Epilogue(activation, other, residual)
        elif not is_compiling():
            y = _core.linear_tensor(
                input, packed, self.in_features, self.out_features, self._quantizer
            )
            if y is not None:
                return y
        if isinstance(input, QuantizedActivation):
            self._check_quantized(input)
            return ops.linear_quantized(input, packed, self.out_features, steps or Epilogue())
        operands = [operand for operand in (other, residual) if operand is not None]
        plain = ops.is_plain(input) and all(ops.is_plain(operand) for operand in operands)
        if plain and not ops.needs_gradient(input, *operands):
            return ops.linear(
                input, packed, self.in_features, self.out_features, self._quantizer, steps
            )
        ops.check(input, packed, self.in_features, operands)
        return torch_ops.linear(
            input, packed, self.out_features, self.inverse_smoothing, self._settings, steps
        )

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """Quantize x [..., in_features] once for every layer that quantizes alike.

        Alike are layers of one width and scheme, with equal static scales, smoothings and rotation.

        Raises
        ------
        SqCpuError
            For what `forward` refuses, and where torch traces or transforms the call.
        """
        ops.check(x, self.packed, self.in_features)
        ops.refuse_gradient(x)
        if not ops.is_plain(x):
            raise SqCpuError("quantize_input cannot be traced or transformed; call the layer on x")
        return ops.quantize_activations(x, self._quantizer)

    def forward_int8(
        self,
        x: Tensor | QuantizedActivation,
        next_layer: QuantLinear,
        *,
        activation: Activation | None = None,
        other: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> QuantizedActivation:
        """Return `forward`'s y as the codes that `next_layer` takes: int8 from layer to layer.

        y is not rounded to a float dtype between: its codes are those of the fp32 values. A row
        that is not finite has a scale of NaN. A step of the product sees parts of rows: the scheme
        must be static, `next_layer` without a smoothing of its own and `hadamard`, and all rows
        keep the static scale (`Scheme.dynamic_fallback`); `row_counts` has them as chained. The
        default range leaves out one row in 20, which then saturates; "minmax" does not.

        Raises
        ------
        SqCpuError
            For what `forward` and `quantize_input` refuse, and a `next_layer` that does not fit.
        """
        if next_layer.in_features != self.out_features:
            raise SqCpuError(
                f"int8 linear: the next layer takes {next_layer.in_features} features, "
                f"this one gives {self.out_features}"
            )
        divides = next_layer.smoothing is not None or next_layer.hadamard
        if next_layer.input_scale is None or divides:
            raise SqCpuError(
                "int8 linear: codes for the next layer need its static input scale, no smoothing "
                "of its own and no Hadamard matrix; call this layer, then that one"
            )
        if isinstance(x, QuantizedActivation):
            self._check_quantized(x)
        else:
            x = self.quantize_input(x)
        steps = Epilogue(activation, other, residual)
        return ops.linear_requantized(
            x, self.packed, self.out_features, next_layer._quantizer, steps
        )

    @property
    def static(self) -> tuple[float, int] | None:
        """Scale and zero point of a static scheme's activations."""
        return None if self.input_scale is None else (self.input_scale, self.input_zero_point)

    def reference(
        self,
        x: Tensor,
        *,
        activation: Activation | None = None,
        other: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return what `forward` returns, computed in plain torch by `linear_reference`."""
        return linear_reference(
            x,
            self.weight_int8(),
            self.weight_scale,
            self.bias,
            self.scheme,
            self.static,
            smoothing=self.smoothing,
            hadamard=self.hadamard,
            activation=activation,
            other=other,
            residual=residual,
        )

    def count_saturation(self, x: Tensor | QuantizedActivation) -> tuple[int, int]:
        """Return how many pairs of products `forward` adds for `x`, and how many leave int16.

        A pair is u[2j] w[2j] + u[2j+1] w[2j+1] of the codes and the weights; raises as `forward`.
        """
        if isinstance(x, QuantizedActivation):
            self._check_quantized(x)
            codes = x
        else:
            codes = self.quantize_input(x.detach())
        return _core.count_saturation(
            codes.codes,
            codes.zero_point,
            codes.max_code,
            self.packed,
            self.out_features,
            weight_columns(self.in_features, self.hadamard),
        )

    @property
    def packed_weight(self) -> PackedWeight:
        """The packed weight, a view of `packed`."""
        columns = weight_columns(self.in_features, self.hadamard)
        return PackedWeight(self.packed, self.out_features, columns)

    def weight_int8(self) -> Tensor:
        """Return the weight, int8 [out_features, in_features], unpacked into new memory.

        With `hadamard` it is rotated, and has whole blocks of columns.
        """
        return self.packed_weight.weight()

    def weight_float(self) -> Tensor:
        """Return the weight that the codes stand for, fp32 [out_features, in_features].

        Smoothing and rotation are undone: it is that of the float linear, rounded.
        """
        weight = self.weight_int8().float() * self.weight_scale[:, None]
        if self.hadamard:
            weight = fwht64(weight)[:, : self.in_features]
        return weight if self.smoothing is None else weight / self.smoothing

    @property
    def weight(self) -> Tensor:
        """Return a tensor [out_features, in_features] of the layer's `dtype`, without values.

        For models that look at their linears' weights first (T5 casts its input to their dtype).
        Whatever computes with it raises `SqCpuError`; `weight_int8` has the values.
        """
        weight = PackedWeight(self.packed, self.out_features, self.in_features)
        return weight.unreadable(self.dtype)

    @property
    def weight_scale(self) -> Tensor:
        """Return the weight's scales, fp32 [out_features]."""
        return self.packed_weight.scale()

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, fp32 [out_features], or None."""
        return self.packed_weight.bias() if self.has_bias else None

    @property
    def nbytes(self) -> int:
        """Resident bytes: the packed weight with its scales and bias, s, and 1 / s twice."""
        smoothing = 0 if self.smoothing is None else 3 * self.smoothing.nbytes
        return self.packed_weight.nbytes + smoothing

    def extra_repr(self) -> str:
        """Return the shape and the scheme, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.has_bias}, scheme={self.scheme.name}"
            + (f", hadamard={self.hadamard}" if self.hadamard else "")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        # What .to(), .half() and the like end in: the dtype follows, which no tensor has.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _check_quantized(self, x: QuantizedActivation) -> None:
        if x.in_features != self.in_features:
            raise SqCpuError(
                f"int8 linear: input is quantized [..., {x.in_features}], "
                f"the layer needs [..., {self.in_features}]"
            )
        if x.quantizer != self._quantizer:
            raise SqCpuError(
                "int8 linear: input is quantized by another scheme, static scale, smoothing or "
                "Hadamard matrix; use this layer's quantize_input"
            )
        if not self.packed.is_cpu:
            raise SqCpuError(
                f"int8 linear: weights are on {self.packed.device}; sq_cpu runs on the CPU only"
            )

    def _set_quantizer(
        self,
        static: tuple[float, int] | None,
        smoothing: Tensor | None,
        quantizer: _core.ActivationQuantizer | None = None,
    ) -> None:
        quantizer = quantizer or layer_quantizer(
            self.scheme, self.in_features, static, smoothing, self.hadamard
        )
        # Neither parameters nor buffers: .to(bfloat16) must not round them.
        self.input_scale = None if static is None else static[0]
        self.input_zero_point = 0 if static is None else static[1]
        self.smoothing = smoothing
        with torch.inference_mode(False):  # else autograd cannot save it
            self.inverse_smoothing = None if smoothing is None else ops.reciprocals(smoothing)
        self._quantizer = quantizer
        self._settings = layer_settings(self.scheme, static, self.hadamard)

    def entries(self) -> Entries:
        """Return the shape and dtype of each entry of the state dict."""
        return linear_entries(
            self.in_features,
            self.out_features,
            self.scheme,
            bias=self.has_bias,
            smoothed=self.smoothing is not None,
            hadamard=self.hadamard,
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        number = partial(torch.tensor, device="cpu")
        destination[prefix + "weight"] = self.weight_int8()
        destination[prefix + "weight_scale"] = self.weight_scale
        if self.has_bias:
            destination[prefix + "bias"] = self.bias
        if self.input_scale is not None:
            destination[prefix + "input_scale"] = number(self.input_scale, dtype=torch.float32)
            destination[prefix + "input_zero_point"] = number(
                self.input_zero_point, dtype=torch.int32
            )
        if self.smoothing is not None:
            destination[prefix + "smoothing"] = self.smoothing.clone()
        if self.hadamard:
            destination[prefix + "hadamard"] = number(self.hadamard, dtype=torch.int32)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entries = self.entries()
        found = found_entries(entries, state_dict, prefix, missing_keys, error_msgs)
        if strict:
            unexpected_keys += unknown_keys(entries, state_dict, prefix)
        if len(found) < len(entries):
            return
        if self.hadamard and int(found["hadamard"]) != self.hadamard:
            error_msgs.append(f"{prefix}hadamard is not {self.hadamard}, as the layer's is")
            return
        # Checked before, taken over after the weight: a refusal leaves the layer as it was.
        static = None
        if "input_scale" in found:
            static = float(found["input_scale"]), int(found["input_zero_point"])
        smoothing = found.get("smoothing")
        smoothing = None if smoothing is None else own_copy(smoothing)
        quantizer = layer_quantizer(self.scheme, self.in_features, static, smoothing, self.hadamard)
        self.packed_weight.pack(found["weight"], found["weight_scale"], found.get("bias"))
        self._set_quantizer(static, smoothing, quantizer)
