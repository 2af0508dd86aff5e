"""An int8 linear with LoRA adapters of PEFT (arXiv 2106.09685): A and B are float.

y = int8(x) + B(A(dropout(x))) * scaling
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from sq_cpu.errors import SqCpuError

__all__ = ["LoraQuantLinear"]

_INIT = (True, False, "gaussian")


class LoraQuantLinear(Linear):  # type: ignore[misc]
    """What PEFT puts in the place of an int8 linear. Adapters are not merged into int8 weights."""

    def __init__(
        self, base_layer: Any, adapter_name: str, *, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.use_dora:
            raise SqCpuError("an int8 linear has no weight for DoRA to scale: use_dora=False")
        if config.init_lora_weights not in _INIT:
            raise SqCpuError(
                f"init_lora_weights={config.init_lora_weights!r} begins from a float weight, which "
                "an int8 linear has not: use True, False or 'gaussian'"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # PEFT's own warns of a class that it does not know.
        return module.in_features, module.out_features

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuse: the sum would have to be quantized again."""
        raise SqCpuError(
            "an adapter is not merged into int8 weights: unload it, or merge it into the model "
            "that dequantize() gives, and quantize that"
        )
