"""What `quantize` refuses; all refusals leave the model as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantize_cases import Twice, calibrated, refuse
from tiny import batches, tiny_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan
from sq_cpu.smoothing.smooth import fold


def test_wrong_arguments_are_refused() -> None:
    model, found = calibrated("llama")
    refuse(model, "unknown scheme 'O4'; known are O1, O2, O3", found, scheme="O4")
    refuse(model, "need a calibration")
    refuse(model, "need a calibration", scheme="O3", smooth=False)
    plan = SmoothPlan.uniform(model, found)
    refuse(model, "a plan and smooth=False; drop one", found, plan, smooth=False)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_ranges_that_need_rows_are_refused_without(kind: Any) -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches(), rows=0)
    quantize(copy.deepcopy(model), found, scheme="O3")
    scheme = Scheme.of("O3", static_range=kind)
    refuse(model, "needs sampled rows: calibrate with rows=64", found, scheme=scheme)


def test_models_that_cannot_be_quantized_are_refused() -> None:
    refuse(nn.Sequential(nn.ReLU()), "no Linear that is not ignored", smooth=False)
    refuse(nn.Linear(2, 2), "itself a Linear", smooth=False)
    wide = nn.Sequential(nn.Linear(_core.MAX_DEPTH + 1, 1))
    refuse(wide, "0 has 65794 input channels; int32 sums hold 65793", smooth=False)


def test_a_quantized_model_is_refused() -> None:
    model = quantize(Twice(), smooth=False)
    with pytest.raises(SqCpuError, match="quantized already"):
        quantize(model, smooth=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_broken_weights_are_refused(value: float, kind: str) -> None:
    model = Twice()
    with torch.no_grad():
        getattr(model.rest[2], kind).view(-1)[1] = value
    refuse(model, rf"rest\.2\.{kind} has NaN or Inf", smooth=False)


def test_incomplete_calibrations_are_refused() -> None:
    model, found = calibrated("llama")
    name = "model.layers.1.mlp.up_proj"
    low = {key: value for key, value in found.channel_min.items() if key != name}
    refuse(model, f"does not cover {name}", replace(found, channel_min=low))
    nothing = replace(found, channel_min={}, unreached=tuple(found.channel_min))
    refuse(model, "no calibration batch reached any linear", nothing)


def test_infinite_static_ranges_are_refused() -> None:
    model, found = calibrated("llama")
    name = "model.layers.1.mlp.up_proj"
    broken = replace(found, channel_max=found.channel_max | {name: torch.full((32,), torch.inf)})
    message = f"calibrated range of {name} is not finite"
    refuse(model, message, broken, scheme="O3", smooth=False)
    refuse(model, message, broken, SmoothPlan(()), scheme="O3")
    quantize(model, broken, scheme="O1", smooth=False)  # which needs no range


def test_calibrations_of_other_weights_are_refused() -> None:
    model, found = calibrated("llama")
    message = r"weights of .* changed since the calibration: calibrate again"
    other = tiny_model("llama", seed=1)
    refuse(other, message, found, scheme="O3")
    fold(model, SmoothPlan.uniform(model, found), found)
    refuse(model, message, found, scheme="O3", smooth=False)
    refuse(model, message, found, scheme="O1")
    quantize(model, calibrate(model, batches()), scheme="O3", smooth=False)


def test_a_misspelt_ignore_is_refused() -> None:
    model, found = calibrated("llama")
    scheme = Scheme(ignore=("lm_head", "donw_proj"))
    refuse(model, "'donw_proj', which matches no linear: use down_proj", found, scheme=scheme)


def test_an_adapter_that_is_not_merged_is_refused() -> None:
    class Lora(nn.Module):  # as peft's: the base layer, and what merges into it
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)

        def unmerge(self) -> None: ...

    refuse(nn.Sequential(Lora()), r"0\.base_layer has an adapter beside it: merge", smooth=False)


def test_linears_with_hooks_or_parametrizations_are_refused() -> None:
    model = Twice()
    handle = model.rest[2].register_forward_hook(lambda *_: None)
    refuse(model, r"rest\.2 has forward hooks, which int8 would lose", smooth=False)
    handle.remove()
    weight_norm(model.first)
    refuse(model, "first is parametrized, which int8 would lose", smooth=False)


def test_plans_for_layers_that_are_not_there_are_refused() -> None:
    model, found = calibrated("llama")
    for names in (["nowhere"], ["model.norm", "lm_head"], ["down_proj"]):
        plan = SmoothPlan((), tuple(LayerPlan(name=name, in_float=True) for name in names))
        refuse(model, f"the plan has an entry for {', '.join(names)}, no linear", found, plan)
    everything = [LayerPlan(name=name, in_float=True) for name in found.channel_min]
    refuse(model, "nothing to quantize", found, SmoothPlan((), tuple(everything)))


def test_a_float_linear_may_have_hooks_and_nan() -> None:
    model = Twice()
    model.rest[2].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model.rest[2].weight[0, 0] = float("nan")
    plan = SmoothPlan((), (LayerPlan(name="rest.2", in_float=True),))
    assert quantize(model, plan=plan).sq_cpu_config.layers == ("first",)
