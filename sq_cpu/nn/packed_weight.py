"""A linear's int8 weight in the layout of the kernels: the one place that packs and unpacks it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.ops import is_dense

__all__ = ["PackedWeight", "untouched_pages"]

_ONE_THREAD = 32 << 10  # torch fills fewer bytes by the caller alone (GRAIN_SIZE)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weight [out_features, in_features], its scales and bias, in one buffer.

    It is a view of a tensor that a module owns: `pack` writes into that, the others read it.
    """

    buffer: Tensor
    """uint8 [nbytes], laid out as cpp/include/sq_cpu/linear.h draws it."""
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        """Raise `SqCpuError` for a buffer of another size."""
        size = _core.packed_bytes(self.out_features, self.in_features)
        if self.buffer.dtype != torch.uint8 or self.buffer.numel() != size:
            raise SqCpuError(
                f"int8 linear: {self.buffer.numel()} elements of {self.buffer.dtype} are not a "
                f"packed weight [{self.out_features}, {self.in_features}], which takes {size} of "
                "uint8"
            )

    @classmethod
    def zeros(cls, out_features: int, in_features: int) -> PackedWeight:
        """Allocate a weight of zeros without a bias.

        Raises
        ------
        SqCpuError
            When in_features exceeds 65793, where an int32 sum could overflow, and without memory.
        """
        size = _core.packed_bytes(out_features, in_features)
        with torch.inference_mode(False):  # else autograd cannot save it
            return cls(_untouched_zeros(size), out_features, in_features)

    @property
    def nbytes(self) -> int:
        """Resident bytes, scales and bias included."""
        return self.buffer.nbytes

    def pack(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Overwrite it.

        Parameters
        ----------
        weight : int8 [out_features, in_features]
        scale : floating point [out_features]; y is the integer sum times this
        bias : floating point [out_features], or None, which is packed as zeros

        Raises
        ------
        SqCpuError
            For tensors of another device than the CPU, and a scale of NaN or Inf.
        """
        tensors = [self.buffer, weight, scale, *([] if bias is None else [bias])]
        if not all(tensor.is_cpu and is_dense(tensor) for tensor in tensors):
            raise SqCpuError(
                "int8 linear: sq_cpu packs on the CPU only, dense tensors; move the weight there"
            )
        if any(tensor.is_complex() for tensor in tensors):
            raise SqCpuError("int8 linear: a scale or bias is complex; use floating point")
        if not scale.isfinite().all():
            raise SqCpuError("a weight scale is NaN or Inf: quantize the model again")
        weight, scale = weight.contiguous(), scale.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        if weight.shape != (self.out_features, self.in_features):
            raise SqCpuError(
                f"int8 linear: the weight is {list(weight.shape)}, "
                f"the layer's [{self.out_features}, {self.in_features}]"
            )
        _core.pack_weight(weight, scale, bias, self.buffer)

    def weight(self) -> Tensor:
        """Return the codes, int8 [out_features, in_features], unpacked into new memory."""
        shape = (self.out_features, self.in_features)
        weight = torch.empty(shape, dtype=torch.int8, device="cpu")
        self._unpack(weight=weight)
        return weight

    def unreadable(self, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the codes' shape and device, and this dtype, without values."""
        shape = (self.out_features, self.in_features)
        return Tensor._make_wrapper_subclass(
            _Unreadable, shape, dtype=dtype, device=self.buffer.device
        )

    def scale(self) -> Tensor:
        """Return the scales, fp32 [out_features]."""
        scale = torch.empty(self.out_features, dtype=torch.float32, device="cpu")
        self._unpack(scale=scale)
        return scale

    def bias(self) -> Tensor:
        """Return the bias, fp32 [out_features]; zeros where there is none."""
        bias = torch.empty(self.out_features, dtype=torch.float32, device="cpu")
        self._unpack(bias=bias)
        return bias

    def _unpack(self, **out: Tensor) -> None:
        if not self.buffer.is_cpu:
            raise SqCpuError(
                f"int8 linear: the weight is on {self.buffer.device}; sq_cpu runs on the CPU only"
            )
        shape = self.out_features, self.in_features
        outputs = (out.get(name) for name in ("weight", "scale", "bias"))
        _core.unpack_weight(self.buffer, *shape, *outputs)


class _Unreadable(Tensor):
    """A tensor without values; one on the meta device is no safe one, as products take it.

    It has a `__torch_function__`, so that torch's transformer layers call their linears instead of
    handing all weights to a fused kernel.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # what x.to(weight) gives is an x
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise SqCpuError(
            f"{func} needs the values of a QuantLinear's weight, which is packed: quantize with a "
            "calibration, which finds what the model reads itself, or ignore this linear "
            "(weight_int8() has the codes)"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<packed weight {list(self.shape)}, {self.dtype}>"


def _untouched_zeros(size: int) -> Tensor:
    """Return uint8 zeros whose pages no thread has touched.

    The kernels pack into them: huge pages can be asked for, and each page lies near the thread that
    will read it. torch.zeros writes the zeros, from some size on with threads that a forked child
    does not have.
    """
    if size < _ONE_THREAD:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(untouched_pages(size), dtype=torch.uint8)


def untouched_pages(size: int) -> mmap.mmap:
    """Return `size` bytes of zeros, of this process alone; `SqCpuError` without memory."""
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise SqCpuError(f"there is no memory for packed weights of {size} bytes") from error
