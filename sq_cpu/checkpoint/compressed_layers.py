"""A quantized linear of a compressed-tensors model: its tensors, checked, and what they stand for.

A linear ``L`` [N, K] has there, with scales of any float dtype:

    L.weight            int8 [N, K], or L.weight_packed int32 [N, K bits / 32, rounded up] with
                        L.weight_shape int64 [2]: element i of a row at bits [i b, i b + b), low
                        first, plus 2^(b - 1)
    L.weight_scale      [N, 1], [1], or of groups of g columns [N, K / g, rounded up]
    L.weight_zero_point of asymmetric weights, shaped alike; packed along N where the codes are
    L.input_scale       [1], of static inputs; L.input_zero_point int8 [1], of asymmetric ones
    L.bias              [N], if there is one
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sq_cpu.checkpoint.compressed_config import CompressedConfig
from sq_cpu.checkpoint.stored import Header, StoredTensors
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.ops import FLOATS

__all__ = ["GET_AGAIN", "CompressedLayer", "layer_names"]

GET_AGAIN = "get the whole model again"

_FIELDS = (
    *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point"),
    *("weight_g_idx", "input_scale", "input_zero_point", "bias"),
)
_INTEGERS = (torch.int8, torch.int32, torch.int64)
_ONE = ((), (1,), (1, 1))
_POINT = 128  # of codes in int8, which are stored as u8


def layer_names(headers: Mapping[str, Header]) -> list[str]:
    """Return the linears that are stored as integers."""
    parts = [(*name.rpartition("."), header.dtype) for name, header in headers.items()]
    return [
        layer
        for layer, _, field, dtype in parts
        if field == "weight_packed" or (field == "weight" and dtype == torch.int8)
    ]


class CompressedLayer:
    """A linear; `SqCpuError` for a tensor that is missing or misshapen, and what is not read."""

    def __init__(self, name: str, config: CompressedConfig, stored: StoredTensors) -> None:
        self.name = name
        self.group = config.group_of(name)
        self._stored = stored
        self._where = config.where
        self.headers = {
            field: stored.headers[f"{name}.{field}"]
            for field in _FIELDS
            if f"{name}.{field}" in stored.headers
        }
        if ".experts." in f".{name}":
            raise SqCpuError(
                f"{self._where}: {name} is an expert of a mixture, which sq_cpu does not read from "
                "this format; quantize the float model instead"
            )
        if "weight_g_idx" in self.headers:
            raise SqCpuError(
                f"{self._where}: the columns of {name} are in groups by activation (weight_g_idx), "
                "which sq_cpu does not read; compress the model with actorder='weight'"
            )
        self.out_features, self.in_features = self._shape()
        size = self.group.group_size or max(self.in_features, 1)
        self._columns = size
        self.scales_per_row = max(1, -(-self.in_features // size))
        self._check()

    @property
    def codes_name(self) -> str:
        """The stored tensor of the codes."""
        return f"{self.name}.{'weight_packed' if self.group.packed else 'weight'}"

    def codes(self) -> Tensor:
        """Return the weight's integers less their zero points, int8 [N, K]."""
        codes, points = self._codes(), self._zero_points()
        if points is None:
            return codes
        wide = codes.short() - points
        if wide.numel() and not -128 <= int(wide.min()) <= int(wide.max()) <= 127:
            raise SqCpuError(
                f"{self._where}: {self.name} has asymmetric weights, whose codes less their zero "
                "point leave int8; sq-cpu quantize (in Python, load_source and quantize) makes "
                "floats of them, exactly, and int8 of those"
            )
        return wide.to(torch.int8)

    def row_scales(self) -> Tensor:
        """Return the one scale of each row, fp32 [N]."""
        if self.scales_per_row > 1:
            raise SqCpuError(
                f"{self._where}: {self.name} has a scale for every {self._columns} input channels, "
                "which rows of int8 with one scale cannot hold exactly; sq-cpu quantize (in "
                "Python, load_source and quantize) makes floats of them, exactly, and int8 of those"
            )
        return self._scales()[:, 0].contiguous()

    def weight(self) -> Tensor:
        """Return the weight, fp32 [N, K]: codes times scales; exact for scales of 16 bits."""
        weight, points = self._codes().float(), self._zero_points()
        if points is not None:
            weight -= points
        return weight.mul_(self._spread(self._scales()))

    def static(self) -> tuple[Tensor, Tensor]:
        """Return scale, fp32 [], and zero point of u8 codes, int32 [], of static inputs."""
        point = torch.zeros(1, dtype=torch.int32)
        if "input_zero_point" in self.headers:
            point = self._read("input_zero_point").to(torch.int32)
            if self.group.symmetric and point.any():
                self._refuse("input_zero_point is not 0, but its group is symmetric")
        return self._read("input_scale").float().reshape(()), (point + _POINT).reshape(())

    def bias(self) -> Tensor:
        """Return the bias as it is stored, [N]."""
        return self._read("bias")

    def _shape(self) -> tuple[int, int]:
        field = self.codes_name.rpartition(".")[2]
        if field not in self.headers:
            kind = "pack" if self.group.packed else "int"
            self._refuse(f"{field} is missing, which the format {kind}-quantized stores")
        dtype = torch.int32 if self.group.packed else torch.int8
        header = self.headers[field]
        if len(header.shape) != 2 or header.dtype != dtype:
            self._refuse(f"{field} is {header}, not a matrix of {_named(dtype)}")
        rows, columns = header.shape
        if not self.group.packed:
            return rows, columns
        self._check_field("weight_shape", ((2,),), _INTEGERS)
        n, k = self._read("weight_shape").tolist()
        if n != rows or k < 0 or -(-k * self.group.bits // 32) != columns:
            self._refuse(f"weight_shape is [{n}, {k}], which does not fit {field}, {header}")
        return n, k

    def _check(self) -> None:
        group, rows = self.group, self.out_features
        shapes = {
            "tensor": _ONE,
            "channel": ((rows, 1), (rows,)),
            "group": ((rows, self.scales_per_row),),
        }[group.strategy]
        self._check_field("weight_scale", shapes, FLOATS)
        if not group.symmetric_weights or "weight_zero_point" in self.headers:
            packed = group.packed and group.strategy != "tensor"
            words = -(-rows * group.bits // 32)
            points = ((words, self.scales_per_row),) if packed else shapes
            self._check_field("weight_zero_point", points, _INTEGERS)
        if group.activations == "static":
            self._check_field("input_scale", _ONE, FLOATS)
            if not group.symmetric or "input_zero_point" in self.headers:
                self._check_field("input_zero_point", _ONE, _INTEGERS)
        elif "input_scale" in self.headers:
            self._refuse("input_scale is there, but the inputs of its group are not static")
        if "bias" in self.headers:
            self._check_field("bias", ((rows,),), FLOATS)

    def _check_field(
        self, field: str, shapes: Collection[tuple[int, ...]], dtypes: Collection[torch.dtype]
    ) -> None:
        header = self.headers.get(field)
        if header is None:
            self._refuse(f"{field} is missing")
        elif header.shape not in shapes or header.dtype not in dtypes:
            kind = "integers" if dtypes is _INTEGERS else "floats"
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self._refuse(f"{field} is {header}, not {kind} {wanted}")

    def _refuse(self, what: str) -> None:
        raise SqCpuError(f"{self._where}: {self.name}.{what}; {GET_AGAIN}")

    def _read(self, field: str) -> Tensor:
        return self._stored.read(f"{self.name}.{field}")

    def _codes(self) -> Tensor:
        if not self.group.packed:
            return self._read("weight")
        return _unpacked(self._read("weight_packed"), self.group.bits, self.in_features)

    def _zero_points(self) -> Tensor | None:
        """Return the points, int16 [N, K], or None for symmetric weights."""
        if "weight_zero_point" not in self.headers:
            return None
        points = self._read("weight_zero_point")
        if self.group.packed and self.group.strategy != "tensor":
            points = _unpacked(points.to(torch.int32).T, self.group.bits, self.out_features).T
        if not self.group.symmetric_weights:
            return self._spread(points.short())
        if points.any():  # early versions stored zeros
            self._refuse("weight_zero_point is not 0, but its group is symmetric")
        return None

    def _scales(self) -> Tensor:
        """Return the scales, fp32 [N, scales of a row]."""
        scales = self._read("weight_scale").float()
        if not scales.isfinite().all():
            self._refuse("weight_scale has NaN or Inf")
        return scales.reshape(-1, self.scales_per_row).expand(self.out_features, -1)

    def _spread(self, values: Tensor) -> Tensor:
        """Return [N, K] of what groups of columns share."""
        values = values.reshape(-1, self.scales_per_row).expand(self.out_features, -1)
        return values.repeat_interleave(self._columns, dim=1)[:, : self.in_features]


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return signed integers of a few bits, int8 [rows, count], from int32 [rows, words]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device="cpu")
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (codes.flatten(1)[:, :count] - (1 << (bits - 1))).to(torch.int8)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
