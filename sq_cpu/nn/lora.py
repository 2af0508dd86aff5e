"""LoRA adapters of PEFT for int8 models (arXiv 2106.09685): the base stays int8."""

from __future__ import annotations

from typing import Any

from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear

__all__ = ["with_int8_layers"]


def with_int8_layers(config: Any) -> Any:
    """Have a `peft.LoraConfig` take int8 linears for its targets, and return it.

    For `get_peft_model(model, with_int8_layers(LoraConfig(target_modules=["q_proj", "v_proj"])))`
    and `model.add_adapter`. No file says it, so an adapter is loaded by
    `PeftModel.from_pretrained(model, path, config=with_int8_layers(config))`, where `config` is
    `PeftConfig.from_pretrained(path)`. The targets are named: PEFT takes "all-linear" for the float
    ones.

    Raises
    ------
    SqCpuError
        Without PEFT, and for a config of other adapters.
    """
    require("peft", "peft")
    from peft import LoraConfig

    from sq_cpu.nn.lora_layer import LoraQuantLinear

    if not isinstance(config, LoraConfig):
        raise SqCpuError(
            f"config is a {type(config).__name__}: int8 linears take adapters of a peft.LoraConfig"
        )
    config._register_custom_module(dict.fromkeys((QuantLinear, DecomposedLinear), LoraQuantLinear))
    return config
