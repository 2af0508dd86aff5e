"""Modules in the places of a model's linears."""

from __future__ import annotations

from quantize_cases import Twice
from torch import nn

from sq_cpu.quantization.replace import replace_linears


def test_replace_linears_by_name() -> None:
    model = Twice()
    new = nn.Linear(8, 8)
    replace_linears(model, {"first": new})
    assert model.first is new
    assert model.rest[0] is new
