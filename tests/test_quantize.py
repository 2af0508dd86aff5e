"""quantize: validate, fold, swap; and a model that is left alone when it cannot be quantized."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, logits, tiny_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sq_cpu import _core
from sq_cpu.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.families import FAMILIES
from sq_cpu.linear import QuantLinear
from sq_cpu.quantize import QuantizationRecord, quantize, replace_linears
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import SmoothPlan, fold

TYPES = [name for family in FAMILIES for name in family.model_types]


def calibrated(model_type: str, **kwargs: Any) -> tuple[Any, Calibration]:
    model = tiny_model(model_type, **kwargs)
    return model, calibrate(model, batches())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_and_scheme_runs_close_to_float(model_type: str, scheme: str) -> None:
    model, found = calibrated(model_type)
    before = logits(model)
    assert quantize(model, found, scheme=scheme) is model
    # 8 bits give each product about 1 % noise; with two layers of random weights it stays below 8.
    assert 0 < relative_error(logits(model), before) < 0.08
    assert all(type(m) is not nn.Linear for name, m in model.named_modules() if name != "lm_head")
    assert type(model.lm_head) is nn.Linear
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_the_kernels_equal_the_reference(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = calibrated("llama")
    kernels = logits(quantize(model, found, scheme=scheme))
    monkeypatch.setattr(QuantLinear, "forward", QuantLinear.reference)
    # The linears agree bit for bit; the float operations between them are the same ones.
    torch.testing.assert_close(logits(model), kernels, rtol=0, atol=2.0**-20)


def test_static_ranges_are_the_calibrated_ones_divided_by_s() -> None:
    model, found = calibrated("opt")
    plan = SmoothPlan.uniform(model, found, alpha=0.8)
    scales = fold(copy.deepcopy(model), plan, found)
    quantize(model, found, plan, scheme="O3")
    for name, s in scales.items():
        layer = model.get_submodule(name)
        absmax = (found.absmax(name) / s).max()
        torch.testing.assert_close(torch.tensor(layer.input_scale), absmax / 127)


def test_the_record_says_what_was_done() -> None:
    model, found = calibrated("llama")
    ignore = ("lm_head", "down_proj")
    quantize(model, found, scheme=Scheme(reduce_range="auto", ignore=ignore))
    record = model.sq_cpu_config
    assert record.scheme.reduce_range is not _core.isa()["vnni"]
    assert len(record.layers) == 12
    assert record.plan == SmoothPlan.uniform(tiny_model("llama"), found, ignore=ignore)
    assert len(record.plan.groups) == 6  # down_proj's are left alone
    up = "model.layers.0.mlp.up_proj.bias"
    assert torch.equal(model.state_dict()[up], tiny_model("llama").state_dict()[up])
    assert QuantizationRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    with pytest.raises(SqCpuError, match="has no field 'layers'"):
        QuantizationRecord.from_dict({"scheme": {}, "plan": None})


class Twice(nn.Module):
    """A plain module that holds one linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.rest = nn.Sequential(self.first, nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))  # type: ignore[no-any-return]


def test_any_module_is_quantized_unsmoothed() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 8)
    before = model(x).detach()
    quantize(model, scheme="O1", smooth=False)
    assert model.first is model.rest[0]
    assert isinstance(model.first, QuantLinear)
    assert model.sq_cpu_config.layers == ("first", "rest.2")
    assert model.sq_cpu_config.plan is None
    assert relative_error(model(x), before) < 0.05
    static = Twice()
    quantize(static, calibrate(static, [x]), scheme="O3", smooth=False)
    assert static.first.input_scale == pytest.approx(float(x.abs().max()) / 127, rel=0.3)


def test_a_tied_head_is_quantized_apart_from_the_embedding() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding, before = model.model.embed_tokens.weight.clone(), logits(model)
    found = calibrate(model, batches(), ignore=())
    quantize(model, found, scheme=Scheme(ignore=()))
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False
    assert relative_error(logits(model), before) < 0.08


def test_an_ignored_tied_head_stays_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    quantize(model, calibrate(model, batches()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_replace_linears_by_name() -> None:
    model = Twice()
    new = nn.Linear(8, 8)
    replace_linears(model, {"first": new})
    assert model.first is new
    assert model.rest[0] is new


# --- refusals, all of which leave the model as it was -------------------------------------------


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


def test_wrong_arguments_are_refused() -> None:
    model, found = calibrated("llama")
    refuse(model, "unknown scheme 'O4'; known are O1, O2, O3", found, scheme="O4")
    refuse(model, "need a calibration")
    refuse(model, "need a calibration", scheme="O3", smooth=False)
    plan = SmoothPlan.uniform(model, found)
    refuse(model, "a plan and smooth=False; drop one", found, plan, smooth=False)


def test_models_that_cannot_be_quantized_are_refused() -> None:
    twice = Twice()
    found = calibrate(twice, [torch.randn(2, 8)])
    refuse(twice, "type 'Twice': known are llama, .* smooth=False", found)
    refuse(nn.Sequential(nn.ReLU()), "no Linear that is not ignored", smooth=False)
    refuse(nn.Linear(2, 2), "itself a Linear", smooth=False)
    wide = nn.Sequential(nn.Linear(_core.MAX_DEPTH + 1, 1))
    refuse(wide, "0 has 66311 input channels; int32 sums hold 66310", smooth=False)
    model, found = calibrated("opt", do_layer_norm_before=False)
    refuse(model, "has do_layer_norm_before=False and the fold needs True", found)


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
    unreached = replace(found, channel_min=low, unreached=(name,))
    refuse(model, f"no calibration batch reached {name}", unreached)


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


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_layers_that_read_weights_themselves_are_refused(kind: Any) -> None:
    model = nn.ModuleDict({"layer": kind(8, 2, 16, batch_first=True), "head": nn.Linear(8, 2)})
    refuse(model, rf"layer\.linear1 is in a {kind.__name__}, .*: ignore it", smooth=False)
    scheme = Scheme(ignore=("linear1", "linear2"))
    assert quantize(model, scheme=scheme, smooth=False).sq_cpu_config.layers == ("head",)


def test_linears_with_hooks_or_parametrizations_are_refused() -> None:
    model = Twice()
    handle = model.rest[2].register_forward_hook(lambda *_: None)
    refuse(model, r"rest\.2 has forward hooks, which int8 would lose", smooth=False)
    handle.remove()
    weight_norm(model.first)
    refuse(model, "first is parametrized, which int8 would lose", smooth=False)


def test_a_fold_that_changes_the_model_is_refused() -> None:
    model, found = calibrated("opt")
    model.model.decoder.layers[0].activation_fn = nn.GELU()
    refuse(model, r"folding group model\.decoder\.layers\.0\.fc1 would change", found)
