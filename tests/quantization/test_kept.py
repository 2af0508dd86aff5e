"""What stays in float beside what is ignored: what no batch reached, under every scheme."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from other_models import ids, other_model
from tiny import tiny_model
from torch import Tensor, nn

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluator import Goal, TuningJob
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.models.linears import linearized
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan
from sq_cpu.tuning.tune import tune

SCHEMES = ["O1", "O2", "O3"]
REASON = "no calibration batch reached it"


class Experts(nn.Module):
    """Three linears, of which the second is called only where `all_of_them` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, all_of_them: bool = False
    ) -> Tensor:
        y: Tensor = self.experts[0](x) + self.experts[2](x)
        return y + self.experts[1](x) if all_of_them else y


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("unreached", ["float", "quantize"])
def test_what_no_batch_reached(scheme: str, unreached: Any) -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 4, 8)
    found = calibrate(model, [x])
    assert found.unreached == ("experts.1",)
    settings = Scheme.of(scheme, unreached=unreached)
    for plan in (None, tune(model, found, scheme=settings), SmoothPlan(())):
        record: Any = quantize(copy.deepcopy(model), found, plan, scheme=settings).sq_cpu_config
        if unreached == "float" or scheme == "O3":
            assert record.layers == ("experts.0", "experts.2")
            assert record.kept == {"experts.1": REASON}
        else:
            assert record.layers == ("experts.0", "experts.1", "experts.2")
            assert record.kept == {}
            assert "experts.1" not in record.smoothed
        assert record.scheme == settings
    if scheme != "O3":  # nothing is known without a calibration
        record = quantize(copy.deepcopy(model), scheme=settings, smooth=False).sq_cpu_config
        assert record.layers == ("experts.0", "experts.1", "experts.2")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_that_saw_padding_alone_was_not_reached(scheme: str) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            kept: Tensor = self.left(x)
            return kept + self.right(x * (1 - attention_mask)[..., None])[attention_mask == 0].sum()

    torch.manual_seed(0)
    model, mask = Halves(), torch.tensor([[1, 1, 1, 0]])
    batch = {"x": torch.randn(1, 4, 8), "attention_mask": mask}
    assert calibrate(model, [batch]).unreached == ()
    nothing = batch | {"attention_mask": torch.zeros_like(mask)}
    found = calibrate(model, [nothing])
    assert found.unreached == ("left", "right")
    masked = replace(calibrate(model, [batch]), unreached=("right",))
    del masked.channel_min["right"], masked.channel_max["right"]
    record: Any = quantize(model, masked, scheme=scheme).sq_cpu_config
    assert record.kept == {"right": REASON}


def test_what_no_batch_reached_follows_the_scheme_of_its_own() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    found = calibrate(model, [torch.randn(4, 8)])
    dynamic = SmoothPlan((), (LayerPlan(name="a", activations="per_token"),))
    settings = Scheme.of("O3", unreached="quantize")
    record: Any = quantize(copy.deepcopy(model), found, dynamic, scheme=settings).sq_cpu_config
    assert record.layers == ("used", "a")
    assert record.kept == {"b": REASON}
    static = SmoothPlan((), (LayerPlan(name="a", activations="static"),))
    settings = Scheme(unreached="quantize")
    record = quantize(copy.deepcopy(model), found, static, scheme=settings).sq_cpu_config
    assert record.layers == ("used", "b")
    assert record.kept == {"a": REASON}
    record = quantize(model, found, static).sq_cpu_config
    assert record.kept == {"a": REASON, "b": REASON}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tower_that_text_does_not_reach_is_what_it_was(scheme: str) -> None:
    model = other_model("llava")
    found = calibrate(model, ids())
    tower = copy.deepcopy(model.model.vision_tower)
    record: Any = quantize(model, found, scheme=scheme).sq_cpu_config
    assert record.kept.keys() > {*found.unreached}
    assert all("vision_tower" in name or "projector" in name for name in found.unreached)
    assert not any("vision_tower" in name for name in record.layers)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before, after = tower(pixels)[0], model.model.vision_tower(pixels)[0]
    assert torch.equal(before, after)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expert_without_tokens_is_what_it_was(scheme: str) -> None:
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1)
    few = [torch.tensor([[1, 2, 3, 4]])]
    found = calibrate(model, few)
    assert found.unreached
    with linearized(model):
        before = {name: model.get_submodule(name).weight.clone() for name in found.unreached}
    record: Any = quantize(model, found, scheme=scheme).sq_cpu_config
    assert record.kept.items() >= dict.fromkeys(found.unreached, REASON).items()
    assert all(torch.equal(model.get_submodule(name).weight, before[name]) for name in before)
    with torch.no_grad():  # on tokens that go to these, too
        assert model(torch.arange(60)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", ["mamba", "jamba", "llava"])
def test_a_search_chooses_among_what_quantize_quantizes(name: str) -> None:
    model = other_model(name)
    found = calibrate(model, ids())
    goal = Goal.of("1%")
    job = TuningJob(model, found, lambda _: 1.0, goal, False, ("lm_head",))
    for activations in ("per_token", "static"):
        settings = Configuration(activations=activations, smoothing="smoothquant", alpha=(0.5,))
        record: Any = quantize(copy.deepcopy(model), found, job.plan(settings)).sq_cpu_config
        assert set(record.layers) == job.linears.keys()
        assert record.kept.keys() >= {*found.unreached, *found.in_float}
