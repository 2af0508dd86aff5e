"""Models to quantize, and how a refusal is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.quantize import quantize


def calibrated(model_type: str, **kwargs: Any) -> tuple[Any, Calibration]:
    model = tiny_model(model_type, **kwargs)
    return model, calibrate(model, batches())


class Twice(nn.Module):
    """A plain module that holds one linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.rest = nn.Sequential(self.first, nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))  # type: ignore[no-any-return]


def refuse(model: nn.Module, message: str, *args: Any, **kwargs: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(SqCpuError, match=message) as caught:
        quantize(model, *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert all(
        torch.equal(
            after[n],
            v,
        )
        or v.isnan().any()
        for n, v in before.items()
    )
    assert not hasattr(model, "sq_cpu_config")
