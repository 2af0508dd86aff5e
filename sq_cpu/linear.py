"""The int8 linear layer: `QuantLinear` runs the kernels, `linear_reference` defines their result.

Weights are int8 with one fp32 scale per output channel (or per tensor), activations become u8 codes
with one scale and zero point per row (SmoothQuant, arXiv 2211.10438, eq. 1 and 2):

    y = (codes - zero_point) @ weight.T * row_scale * weight_scale + bias
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu import _core
from sq_cpu.errors import SqCpuError
from sq_cpu.rounding import quantize_rows, quantize_weight, static_code
from sq_cpu.scheme import Scheme

__all__ = ["QuantLinear", "linear_reference"]

_DTYPES = {
    torch.float32: _core.DType.float32,
    torch.bfloat16: _core.DType.bfloat16,
    torch.float16: _core.DType.float16,
}


def linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    static: tuple[float, int] | None = None,
) -> Tensor:
    """Compute in plain torch exactly what the kernels compute.

    Parameters
    ----------
    x : fp32, bf16 or fp16 [..., in_features]
    weight : int8 [out_features, in_features]
    weight_scale, bias : fp32 [out_features]
    static : (scale, zero point) of a static scheme's activations, from `static_code`

    Returns
    -------
    [..., out_features], of x's dtype
    """
    codes, row_scale, zero_point = quantize_rows(x.reshape(-1, x.shape[-1]).float(), scheme, static)
    # Integers up to 2^31 and their products are exact in fp64.
    total = (codes.double() - zero_point.double()[:, None]) @ weight.double().T
    scale = (row_scale[:, None] * weight_scale).double()
    y = total.float().double() * scale + (0.0 if bias is None else bias.double())
    return y.float().to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _run(
    x: Tensor, packed: Tensor, out_features: int, quantizer: _core.ActivationQuantizer
) -> Tensor:
    *leading, in_features = x.shape
    x = x.resolve_neg().contiguous()
    y = torch.empty(*leading, out_features, dtype=x.dtype, device="cpu")
    kind = _DTYPES[x.dtype]
    torch.get_num_threads()  # torch sets OpenMP's count for this thread only when it is asked
    _core.linear(
        x.data_ptr(),
        kind,
        math.prod(leading),
        packed.data_ptr(),
        out_features,
        in_features,
        quantizer,
        y.data_ptr(),
        kind,
    )
    return y


def _is_plain(x: Tensor) -> bool:
    """Tell whether `x` is ordinary memory that nothing traces or transforms."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _check_packed(x: Tensor, packed: Tensor, out_features: int) -> None:
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise SqCpuError(
            f"int8 linear: input is {x.dtype} of {x.dim()} dimensions; "
            "use float32, bfloat16 or float16, of one or more"
        )
    size = _core.packed_bytes(out_features, x.shape[-1])
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != size:
        raise SqCpuError(
            f"int8 linear: {packed.numel()} elements of {packed.dtype} are not a packed weight "
            f"[{out_features}, {x.shape[-1]}], which takes {size} of uint8"
        )


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
) -> Tensor:
    """Run the kernel where torch traces or transforms; plain calls go straight to `_run`."""
    _check_packed(x, packed, out_features)
    granularity = getattr(_core.Granularity, activations)
    quantizer = _core.ActivationQuantizer(granularity, symmetric, reduce_range, scale, zero_point)
    return _run(x, packed, out_features, quantizer)


@_linear_op.register_fake
def _(x: Tensor, packed: Tensor, out_features: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


class QuantLinear(nn.Module):
    """A linear layer with int8 weights and int8 activations, for inference.

    The packed weight is the only resident copy: int8 tiles, column sums, scales and bias in one
    uint8 buffer, which `deepcopy`, pickling, `share_memory` and `.to(dtype)` carry along unchanged.
    `state_dict` unpacks it exactly, into `weight` (int8 [out_features, in_features]),
    `weight_scale` (fp32 [out_features]), `bias`, and for static schemes `input_scale` and
    `input_zero_point`; `load_state_dict` packs them again.

    Attributes
    ----------
    packed : uint8 buffer, laid out as cpp/include/sq_cpu/linear.h draws it
    input_scale, input_zero_point : of a static scheme; None and 0 otherwise
    """

    packed: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool) -> None:
        """Allocate a layer of zeros, for `load_state_dict` to fill; `scheme` must be resolved."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.scheme = scheme
        size = _core.packed_bytes(out_features, in_features)
        # Zeros from the allocator: no page is touched before its strip is packed.
        packed = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self.register_buffer("packed", packed, persistent=False)
        self._set_input_code(None if scheme.activations != "static" else (1.0, scheme.zero_point))

    @classmethod
    def from_float(
        cls, linear: nn.Linear, scheme: Scheme, input_range: tuple[float, float] | None = None
    ) -> QuantLinear:
        """Quantize `linear`.

        Parameters
        ----------
        input_range : (min, max) of the layer's input, for a static scheme

        Raises
        ------
        SqCpuError
            When the weight is not finite, in_features exceeds 66310 (where an int32 sum could
            overflow), or a static scheme has no input range.
        """
        static = None
        if scheme.activations == "static":
            if input_range is None:
                raise SqCpuError("a static scheme needs the input's range: calibrate the model")
            static = static_code(scheme, *input_range)
        weight, scale = quantize_weight(linear.weight, scheme.weights)
        layer = cls(linear.in_features, linear.out_features, scheme, bias=linear.bias is not None)
        layer._pack(weight, scale, None if linear.bias is None else linear.bias.detach())
        layer._set_input_code(static)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] for x [..., in_features], both fp32, bf16 or fp16.

        Raises
        ------
        SqCpuError
            For another dtype, width or device, and for an input that asks for gradients.
        """
        packed = self.packed
        self._check(x, packed)
        if _is_plain(x):
            return _run(x, packed, self.out_features, self._quantizer)
        scheme = self.scheme
        return torch.ops.sq_cpu.linear(  # type: ignore[no-any-return]
            x,
            packed,
            self.out_features,
            scheme.activations,
            scheme.symmetric,
            scheme.reduce_range,
            self.input_scale or 0.0,
            self.input_zero_point,
        )

    def reference(self, x: Tensor) -> Tensor:
        """Return what `forward` returns, computed in plain torch by `linear_reference`."""
        static = None if self.input_scale is None else (self.input_scale, self.input_zero_point)
        return linear_reference(
            x, self.weight_int8(), self.weight_scale, self.bias, self.scheme, static
        )

    def count_saturation(self, x: Tensor) -> tuple[int, int]:
        """Return how many pairs of products `forward` adds for `x`, and how many leave int16.

        A pair is u[2j] w[2j] + u[2j+1] w[2j+1] of the codes and the weights; raises as `forward`.
        """
        self._check(x, self.packed)
        x = x.detach().resolve_neg().contiguous()
        m, k = math.prod(x.shape[:-1]), self.in_features
        codes = torch.empty(_core.codes_bytes(m, k), dtype=torch.uint8, device="cpu")
        scale = torch.empty(m, dtype=torch.float32, device="cpu")
        zero_point = torch.empty(m, dtype=torch.int32, device="cpu")
        torch.get_num_threads()  # as in _run
        _core.quantize_activations(
            x.data_ptr(),
            _DTYPES[x.dtype],
            m,
            k,
            self._quantizer,
            codes.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr(),
        )
        return _core.count_saturation(
            codes.data_ptr(),
            zero_point.data_ptr(),
            m,
            self.scheme.levels,
            self.packed.data_ptr(),
            self.out_features,
            k,
        )

    def weight_int8(self) -> Tensor:
        """Return the weight, int8 [out_features, in_features], unpacked into new memory."""
        shape = (self.out_features, self.in_features)
        weight = torch.empty(shape, dtype=torch.int8, device="cpu")
        self._unpack(weight=weight)
        return weight

    @property
    def weight_scale(self) -> Tensor:
        """Return the weight's scales, fp32 [out_features]."""
        scale = torch.empty(self.out_features, dtype=torch.float32, device="cpu")
        self._unpack(scale=scale)
        return scale

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, fp32 [out_features], or None."""
        if not self.has_bias:
            return None
        bias = torch.empty(self.out_features, dtype=torch.float32, device="cpu")
        self._unpack(bias=bias)
        return bias

    @property
    def nbytes(self) -> int:
        """Resident bytes: the packed weight with its scales and bias."""
        return self.packed.nbytes

    def extra_repr(self) -> str:
        """Return the shape and the scheme, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.has_bias}, scheme={self.scheme.name}"
        )

    def _check(self, x: Tensor, packed: Tensor) -> None:
        if x.dtype not in _DTYPES:
            raise SqCpuError(f"int8 linear: input is {x.dtype}; use float32, bfloat16 or float16")
        if x.shape[-1:] != (self.in_features,):
            raise SqCpuError(
                f"int8 linear: input is {list(x.shape)}, the layer needs [..., {self.in_features}]"
            )
        if not (x.is_cpu and packed.is_cpu):
            raise SqCpuError(
                f"int8 linear: input is on {x.device}, weights on {packed.device}; "
                "sq_cpu runs on the CPU only"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise SqCpuError("int8 linear has no gradient: call the model under torch.no_grad()")

    def _set_input_code(self, static: tuple[float, int] | None) -> None:
        if static is not None:
            scale, zero_point = static
            symmetric = zero_point == self.scheme.zero_point
            fits = symmetric if self.scheme.symmetric else 0 <= zero_point <= self.scheme.levels
            if not (0 < scale < math.inf and fits):
                raise SqCpuError(
                    f"static input scale {scale:g} with zero point {zero_point} is not of this "
                    "scheme: calibrate and quantize the model again"
                )
        # Plain numbers: .to(bfloat16) must not round them.
        self.input_scale = None if static is None else static[0]
        self.input_zero_point = 0 if static is None else static[1]
        self._quantizer = _core.ActivationQuantizer(
            getattr(_core.Granularity, self.scheme.activations),
            self.scheme.symmetric,
            self.scheme.qmax == 63,
            self.input_scale or 0.0,
            self.input_zero_point,
        )

    def _pack(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        tensors = [self.packed, weight, scale, *([] if bias is None else [bias])]
        if not all(tensor.is_cpu for tensor in tensors):
            raise SqCpuError("int8 linear: sq_cpu packs on the CPU only; move the weight there")
        if not scale.isfinite().all():
            raise SqCpuError("a weight scale is NaN or Inf: quantize the model again")
        weight, scale = weight.contiguous(), scale.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        _core.pack_weight(
            weight.data_ptr(),
            scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self.out_features,
            self.in_features,
            self.packed.data_ptr(),
        )

    def _unpack(self, **out: Tensor) -> None:
        if not self.packed.is_cpu:
            raise SqCpuError(
                f"int8 linear: the weight is on {self.packed.device}; sq_cpu runs on the CPU only"
            )
        addresses = dict.fromkeys(("weight", "scale", "bias"), 0)
        addresses |= {name: tensor.data_ptr() for name, tensor in out.items()}
        _core.unpack_weight(
            self.packed.data_ptr(), self.out_features, self.in_features, **addresses
        )

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each entry of the state dict."""
        entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((self.out_features, self.in_features), torch.int8),
            "weight_scale": ((self.out_features,), torch.float32),
        }
        if self.has_bias:
            entries["bias"] = ((self.out_features,), torch.float32)
        if self.scheme.activations == "static":
            entries |= {
                "input_scale": ((), torch.float32),
                "input_zero_point": ((), torch.int32),
            }
        return entries

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight_int8()
        destination[prefix + "weight_scale"] = self.weight_scale
        if self.has_bias:
            destination[prefix + "bias"] = self.bias
        if self.input_scale is not None:
            destination[prefix + "input_scale"] = torch.tensor(
                self.input_scale, dtype=torch.float32, device="cpu"
            )
            destination[prefix + "input_zero_point"] = torch.tensor(
                self.input_zero_point, dtype=torch.int32, device="cpu"
            )

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
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in entries.items():
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif tuple(tensor.shape) != shape or tensor.dtype != dtype:
                error_msgs.append(
                    f"{prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"the layer needs {dtype} {shape}"
                )
            else:
                found[name] = tensor
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key.removeprefix(prefix) not in entries
            ]
        if len(found) < len(entries):
            return
        # The small one first: what it refuses leaves the layer as it was.
        if "input_scale" in found:
            self._set_input_code((float(found["input_scale"]), int(found["input_zero_point"])))
        self._pack(found["weight"], found["weight_scale"], found.get("bias"))
