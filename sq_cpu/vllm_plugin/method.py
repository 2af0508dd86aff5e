"""An int8 linear of ours in vLLM: its tensors, by vLLM's loaders, then packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from sq_cpu.errors import SqCpuError
from sq_cpu.nn.quantizer import layer_quantizer
from sq_cpu.vllm_plugin.packing import apply_packed, drop, pack_into
from sq_cpu.vllm_plugin.served import LayerKind, columns_here

__all__ = ["SqCpuLinearMethod"]

_ENTRIES = ("weight", "weight_scale", "input_scale", "input_zero_point", "hadamard", "smoothing")


class _Smoothing(PerTensorScaleParameter):  # type: ignore[misc]
    """s of each linear that vLLM lays side by side, [linears, K], or [K] of one."""

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take s whole."""
        self.data.copy_(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take the channels that are on this rank."""
        here = self.data.shape[-1]
        self.data.copy_(loaded_weight.narrow(0, self.tp_rank * here, here))

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **_: Any) -> None:
        rows = self.data.view(-1, self.data.shape[-1])
        rows[self._shard_id_as_int(shard_id)].copy_(loaded_weight)


@register_weight_loader_v2_supported_method
class SqCpuLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How vLLM's linears compute that are int8 in our folder."""

    def __init__(self, kind: LayerKind, name: str) -> None:
        self.kind = kind
        self.name = name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        """Make what is loaded; `SqCpuError` where blocks of a rotation would be cut."""
        kind, rows, linears = self.kind, sum(output_partition_sizes), len(output_partition_sizes)
        columns = columns_here(kind, self.name, input_size_per_partition, input_size)
        layer.sq_cpu_columns = input_size_per_partition

        def per_linear(dtype: torch.dtype) -> Any:
            data = torch.full((linears,), -1, dtype=dtype)
            return PerTensorScaleParameter(data=data, weight_loader=weight_loader)

        # Of three dimensions as it is stored: vLLM cuts the first two.
        layer.register_parameter(
            "weight",
            ModelWeightParameter(
                data=torch.zeros(rows, columns, 1, dtype=torch.int8),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            ),
        )
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(
                data=torch.full((rows,), torch.nan, dtype=torch.float32),
                output_dim=0,
                weight_loader=weight_loader,
            ),
        )
        if kind.is_static:
            layer.register_parameter("input_scale", per_linear(torch.float32))
            layer.register_parameter("input_zero_point", per_linear(torch.int32))
        if kind.hadamard:
            layer.register_parameter("hadamard", per_linear(torch.int32))
        if kind.smoothed:
            shape = (
                (input_size_per_partition,) if linears == 1 else (linears, input_size_per_partition)
            )
            layer.register_parameter(
                "smoothing",
                _Smoothing(
                    data=torch.full(shape, torch.nan, dtype=torch.float32),
                    weight_loader=weight_loader,
                ),
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight, and free what was loaded.

        Raises `SqCpuError` where linears side by side do not quantize their input alike, and for
        values that `sq_cpu.load` refuses.
        """
        kind = self.kind
        static = smoothing = None
        if kind.is_static:
            points = self._shared(layer, "input_zero_point")
            static = float(self._shared(layer, "input_scale")), int(points)
        if kind.hadamard and int(self._shared(layer, "hadamard")) != kind.hadamard:
            raise SqCpuError(
                f"{self.name}.hadamard is not {kind.hadamard}, as config.json says; copy the "
                "checkpoint again"
            )
        if kind.smoothed:
            smoothing = self._shared(layer, "smoothing").contiguous()
        # Checks the values, as for a layer of ours.
        layer_quantizer(kind.scheme, layer.sq_cpu_columns, static, smoothing, kind.hadamard)
        weight, scale = layer.weight.detach().squeeze(-1), layer.weight_scale.detach()
        pack_into(layer, weight, scale, kind.settings(static), smoothing)
        drop(layer, *_ENTRIES)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y [..., N] of x [..., K]."""
        return apply_packed(layer, x, bias)

    def _shared(self, layer: Any, entry: str) -> Tensor:
        """Return what all linears side by side have in common."""
        values: Tensor = getattr(layer, entry).detach()
        if entry == "smoothing":
            values = values.view(-1, values.shape[-1])
        if not all(torch.equal(value, values[0]) for value in values):
            raise SqCpuError(
                f"vLLM computes {self.name} as one linear, and what it is made of differs in "
                f"{entry}; quantize with a plan that treats them alike"
            )
        return values[0]
