"""Our folders as a quantization method of vLLM: which linear is computed how."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sq_cpu.checkpoint.config import QUANT_METHOD
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.vllm_plugin.method import SqCpuLinearMethod
from sq_cpu.vllm_plugin.served import Linears, check_model_type, read_linears

__all__ = ["SqCpuVllmConfig"]

# Where a model of vLLM does not list what it merges.
_MERGED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


class SqCpuVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a folder that `sq_cpu.save` wrote, as vLLM asks for it.

    What vLLM cannot serve raises `SqCpuError`: here what the record says, and the rest when the
    model is built or its weights are loaded.
    """

    def __init__(self, linears: Linears) -> None:
        super().__init__()
        self.linears = linears

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a model may compute in."""
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: it is of GPUs."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: config.json has it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SqCpuVllmConfig:
        """Read a ``quantization_config``."""
        return cls(read_linears(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Hold it against the model's config."""
        check_model_type(getattr(hf_config, "model_type", None))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that modules have in vLLM."""
        names = {name: hf_to_vllm_mapper.map_name(name) or name for name in self.linears.kinds}
        self.linears = self.linears.renamed(names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return how a module computes; None: as without quantization."""
        if isinstance(layer, LinearBase):
            parent, _, name = prefix.rpartition(".")
            merged = (_MERGED | self.packed_modules_mapping).get(name, [name])
            names = [f"{parent}.{each}".removeprefix(".") for each in merged]
            if prefix in self.linears.kinds:  # side by side in the file too
                names = [prefix]
            kind = self.linears.of(names)
            return UnquantizedLinearMethod() if kind is None else SqCpuLinearMethod(kind, prefix)
        inner = prefix if prefix in self.linears.kinds else self.linears.below(prefix)
        if inner is not None:
            raise SqCpuError(
                f"vLLM computes {inner} by {type(layer).__name__}, which sq_cpu does not; "
                "quantize with ignore, which leaves it in float"
            )
        return None
