"""Recipes as Neural Compressor writes them, for any model."""

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["SCALE", "ZERO_POINT", "factor", "write_recipe"]

SCALE, ZERO_POINT = 0.25, 100


def factor(channel: int) -> float:
    """Return what a recipe multiplies an input channel by: a power of two."""
    return 2.0 ** -(channel % 4)


def write_recipe(path: Path, model: nn.Module) -> Path:
    """Write a recipe that quantizes every linear alike, but for the head's, which it leaves out."""
    content: dict[str, Any] = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent = name.rpartition(".")[0].replace(".", ":") or " "
            operators = content.setdefault(parent, {"q_op_infos": {}})["q_op_infos"]
            factors = [factor(channel) for channel in range(linear.in_features)]
            operators[str(len(operators))] = {
                "op_type": "<class 'torch.nn.modules.linear.Linear'>",
                "fqn": name,
                "input_tensor_infos": [
                    {
                        "inf_dtype": "torch.quint8",
                        "scale": [SCALE],
                        "zero_point": [ZERO_POINT],
                        "smooth_quant_scaling_factor": factors,
                    }
                ],
                "weight_tensor_infos": [
                    {
                        "inf_dtype": "torch.qint8",
                        "smooth_quant_scaling_factor": [1 / each for each in factors],
                    }
                ],
            }
    path.write_text(json.dumps(content))
    return path
