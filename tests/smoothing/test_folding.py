"""Folds keep the model's function, or are refused and divided in the pass instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, logits, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.smoothing.folding import apply_folds, refused_folds
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.scales import fold

TYPES = ["llama", "mistral", "qwen2", "opt"]

Scales = dict[SmoothingGroup, Tensor]


def random_scales(model: Any, *, spread: float = 2.0) -> Scales:
    generator = torch.Generator().manual_seed(2)
    return {
        group: torch.exp(spread * torch.randn(group.layout.channels, generator=generator))
        for group in smoothing_groups(model)
        if group.producer is not None
    }


def refused(model: Any, scales: Scales) -> dict[str, str]:
    """Give what the proof refuses, by group name, and why."""
    (ids,) = batches(1)
    with evaluating(model):
        found = refused_folds(model, scales, lambda: [model(ids).logits])
    return {group.name: reason for group, reason in found.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_folds_are_proven_in_any_dtype(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = state(model)
    assert refused(model, random_scales(model, spread=1)) == {}
    assert_unchanged(model, before)


@pytest.mark.parametrize("model_type", TYPES)
def test_random_scales_keep_the_function(model_type: str) -> None:
    model = tiny_model(model_type)
    before, weights = logits(model), state(model)
    scales = random_scales(model)
    apply_folds(model, scales)
    # Every product is rounded to 2^-24 relative; two layers of sums up to 48 long amplify that by
    # far less than the 2^10 allowed here, and a missed consumer moves logits by their own size.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())
    changed = {name for name, value in model.state_dict().items() if (value != weights[name]).any()}
    modules = {name for group in scales for name in (group.name, *group.consumers)}
    assert {f"{name}.weight" for name in modules} <= changed


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_of_two_scales_keep_the_logits_bits(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = logits(model)
    scales = random_scales(model, spread=1)
    apply_folds(model, {group: s.log2().round().exp2() for group, s in scales.items()})
    # Rounding commutes with powers of two, so every product x * w is the same number as before.
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", TYPES)
def test_planted_outliers_are_smoothed_away(model_type: str) -> None:
    model = tiny_model(model_type)
    before = logits(model)
    planted = smoothing_groups(model)[0]
    s = torch.ones(planted.layout.channels)
    s[[3, 7]] = 2.0**-6
    apply_folds(model, {planted: s})  # the norm's output is 64 times larger there
    assert torch.equal(logits(model), before)

    found = calibrate(model, batches())
    name = planted.consumers[0]
    absmax = found.absmax(name)
    assert absmax[[3, 7]].min() > 8 * absmax.median()
    smoothed = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    again = calibrate(model, batches()).absmax(name)
    # Static ranges rest on this: ranges after folding are the ranges before, divided by s.
    torch.testing.assert_close(again, absmax / smoothed.scales[name])
    assert again.max() / again.median() < absmax.max() / absmax.median() / 4
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


def test_a_narrow_dtype_is_rounded_once() -> None:
    model, wide = tiny_model("opt", dtype=torch.bfloat16), tiny_model("opt", dtype=torch.bfloat16)
    wide.float()
    # One group: the product of a second is taken from what the first has rounded.
    scales = dict([next(iter(random_scales(model).items()))])
    apply_folds(model, scales)
    apply_folds(wide, scales)
    for (name, narrow), exact in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, exact.bfloat16()), name


# --- refusals -----------------------------------------------------------------------------------


class LeakyNorm(nn.Module):
    """An MLP that hands its input on, as a post-norm or parallel block does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(mlp.__dict__)
        self.inner = type(mlp).forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self, x)
        return out + 0.01 * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_use_is_caught_and_its_group_named(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    before = state(model)
    assert refused(model, random_scales(model, spread=0.1)) == {
        "model.layers.1.post_attention_layernorm": "something else uses the output of "
        "model.layers.1.post_attention_layernorm, or is not linear in it"
    }
    assert_unchanged(model, before)


def test_a_group_that_misses_a_consumer_is_caught_and_it_is_named() -> None:
    model = tiny_model("llama")
    before = state(model)
    scales = {
        replace(group, consumers=group.consumers[:2]): s
        for group, s in random_scales(model).items()
        if group.name == "model.layers.0.input_layernorm"
    }
    assert refused(model, scales) == {
        "model.layers.0.input_layernorm": "model.layers.0.self_attn.v_proj (Linear) takes the "
        "output of model.layers.0.input_layernorm"
    }
    assert_unchanged(model, before)


def test_an_unsmooth_activation_is_caught() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[1].activation_fn = nn.GELU()  # unlike what the config says
    assert list(refused(model, random_scales(model))) == ["model.decoder.layers.1.fc1"]


def test_several_wrong_folds_are_all_found() -> None:
    model = tiny_model("opt", num_hidden_layers=5)
    wrong = (0, 3, 4)
    for index in wrong:
        model.model.decoder.layers[index].activation_fn = nn.GELU()
    found = refused(model, random_scales(model))
    assert list(found) == [f"model.decoder.layers.{index}.fc1" for index in wrong]


def test_a_refused_fold_divides_in_the_pass_and_says_why() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    before = logits(model)
    found = calibrate(model, batches())
    planned = SmoothPlan.uniform(model, found)
    smoothed = fold(model, planned, found)
    name = "model.layers.1.post_attention_layernorm"
    (changed,) = (group for group in smoothed.plan.groups if group not in planned.groups)
    assert (changed.name, changed.fold) == (name, False)
    assert "something else uses the output" in changed.note
    mlp = "model.layers.1.mlp"
    assert smoothed.in_pass == {f"{mlp}.gate_proj", f"{mlp}.up_proj"}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


def test_without_an_example_nothing_is_folded() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    before = state(model)
    plan = SmoothPlan.uniform(model, found)
    smoothed = fold(model, plan, replace(found, example=None))
    assert all("no example" in group.note and not group.fold for group in smoothed.plan.groups)
    assert smoothed.in_pass == found.channel_min.keys()
    assert_unchanged(model, before)


def test_shared_parameters_are_refused() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    found = refused(model, random_scales(model))
    names = [f"model.layers.{index}.input_layernorm" for index in (0, 1)]
    assert found == dict.fromkeys(
        names, f"{names[0]}.weight and {names[1]}.weight are the same parameter"
    )


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    model = tiny_model("opt", dtype=torch.float16)
    scales = {group: torch.full_like(s, 2.0**-20) for group, s in random_scales(model).items()}
    found = refused(model, scales)
    assert set(found) == {group.name for group in scales}
    assert found["model.decoder.layers.0.fc1"].endswith("fc1.weight would overflow float16")


def test_bad_scales_are_refused() -> None:
    model = tiny_model("llama")
    (group, *_) = smoothing_groups(model)
    for s in (torch.ones(31), torch.zeros(32), torch.full((32,), torch.inf), -torch.ones(32)):
        with pytest.raises(SqCpuError, match="s must be 32 positive finite numbers"):
            refused(model, {group: s})


def test_a_model_that_gives_nan_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(SqCpuError, match="gives NaN"):
        refused(model, random_scales(model))


def test_a_block_that_is_never_called_is_refused() -> None:
    model = tiny_model("llama")
    scales = random_scales(model)
    model.config.num_hidden_layers = 1  # the model runs that many of its layers
    found = refused(model, scales)
    assert found == dict.fromkeys(
        (group.name for group in scales if group.block == "model.layers.1"),
        "the example never reaches it, so the fold cannot be proven",
    )


def test_the_proof_leaves_no_trace() -> None:
    model = tiny_model("llama").train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    refused(model, random_scales(model))
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- a real model -------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_keeps_its_logits(smollm2: Callable[[], tuple[Any, Any]]) -> None:
    model, tokenizer = smollm2()
    ids = tokenizer("The whale is a fish that spouts, with a horizontal tail.", return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).logits
    found = calibrate(model, [dict(ids)])
    down = "model.layers.11.mlp.down_proj"
    assert found.absmax(down).max() > 100 * found.absmax(down).median()  # its known outlier
    smoothed = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    assert smoothed.in_pass == frozenset()
    with torch.no_grad():
        after = model(**ids).logits
    # fp32 eps is 1.2e-7; this network amplifies a relative change of its weights about 100 times.
    assert (after - before).norm() < 1e-4 * before.norm()
    absmax = found.absmax(down) / smoothed.scales[down]
    assert absmax.max() < 100 * absmax.median()
