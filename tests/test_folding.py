"""Folds keep the model's function, for every family row, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import batches, logits, tiny_model
from torch import Tensor, nn

from sq_cpu import families, folding
from sq_cpu.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.families import FAMILIES, Family, Group, smoothing_groups
from sq_cpu.folding import apply_scales
from sq_cpu.smooth import SmoothPlan, consumer_scales, fold

TYPES = [name for family in FAMILIES for name in family.model_types]


def random_scales(model: Any, *, spread: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        group.name: torch.exp(spread * torch.randn(group.channels, generator=generator))
        for group in smoothing_groups(model)
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("model_type", TYPES)
def test_random_scales_keep_the_function(model_type: str) -> None:
    model = tiny_model(model_type)
    before, weights = logits(model), state(model)
    scales = random_scales(model)
    apply_scales(model, scales)
    # Every product is rounded to 2^-24 relative; two layers of sums up to 48 long amplify that by
    # far less than the 2^10 allowed here, and a missed consumer moves logits by their own size.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())
    changed = {name for name, value in model.state_dict().items() if (value != weights[name]).any()}
    assert {f"{name}.weight" for name in consumer_scales(model, scales)} <= changed
    assert {f"{name}.weight" for name in scales} <= changed


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_of_two_scales_keep_the_logits_bits(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = logits(model)
    scales = {name: s.log2().round().exp2() for name, s in random_scales(model, spread=1).items()}
    apply_scales(model, scales)
    # Rounding commutes with powers of two, so every product x * w is the same number as before.
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", TYPES)
def test_planted_outliers_are_smoothed_away(model_type: str) -> None:
    model = tiny_model(model_type)
    before = logits(model)
    planted = smoothing_groups(model)[0]
    s = torch.ones(planted.channels)
    s[[3, 7]] = 2.0**-6
    apply_scales(model, {planted.name: s})  # the norm's output is 64 times larger there
    assert torch.equal(logits(model), before)

    found = calibrate(model, batches())
    name = planted.consumers[0]
    absmax = found.absmax(name)
    assert absmax[[3, 7]].min() > 8 * absmax.median()
    scales = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    again = calibrate(model, batches()).absmax(name)
    # Static ranges rest on this: ranges after folding are the ranges before, divided by s.
    torch.testing.assert_close(again, absmax / scales[name])
    assert again.max() / again.median() < absmax.max() / absmax.median() / 4
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


def test_a_narrow_dtype_is_rounded_once() -> None:
    model, wide = tiny_model("opt", dtype=torch.bfloat16), tiny_model("opt", dtype=torch.bfloat16)
    wide.float()
    scales = random_scales(model)
    apply_scales(model, scales)
    apply_scales(wide, scales)
    for (name, narrow), exact in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, exact.bfloat16()), name


def test_a_new_family_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = Family(("gemma",), "layers", FAMILIES[0].groups, norm_offset=1.0)
    monkeypatch.setattr(families, "FAMILIES", (gemma,))
    model = tiny_model("gemma")
    before = logits(model)
    apply_scales(model, random_scales(model))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


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
def test_a_hidden_consumer_is_caught_and_named(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    before = state(model)
    with pytest.raises(SqCpuError, match=r"group model\.layers\.1\.post_attention_layernorm would"):
        apply_scales(model, random_scales(model, spread=0.1))
    assert_unchanged(model, before)


def test_a_row_that_misses_a_consumer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),)
    monkeypatch.setattr(families, "FAMILIES", (Family(("llama",), "layers", groups),))
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(SqCpuError, match=r"group model\.layers\.0\.input_layernorm would"):
        apply_scales(model, random_scales(model))
    assert_unchanged(model, before)


def test_an_unsmooth_activation_is_caught() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[1].activation_fn = nn.GELU()  # unlike what the config says
    with pytest.raises(SqCpuError, match=r"group model\.decoder\.layers\.1\.fc1 would change"):
        apply_scales(model, random_scales(model))


def test_shared_parameters_are_refused() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    with pytest.raises(SqCpuError, match="are the same parameter"):
        apply_scales(model, random_scales(model))


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    model = tiny_model("opt", dtype=torch.float16)
    before = state(model)
    scales = {name: torch.full_like(s, 2.0**-20) for name, s in random_scales(model).items()}
    with pytest.raises(SqCpuError, match=r"overflow torch\.float16: convert .* to float32"):
        apply_scales(model, scales)
    assert_unchanged(model, before)


def test_bad_scales_are_refused() -> None:
    model = tiny_model("llama")
    name = "model.layers.0.input_layernorm"
    for s in (torch.ones(31), torch.zeros(32), torch.full((32,), torch.inf), -torch.ones(32)):
        with pytest.raises(SqCpuError, match="s must be 32 positive finite numbers"):
            apply_scales(model, {name: s})
    with pytest.raises(SqCpuError, match="no smoothing group norm"):
        apply_scales(model, {"norm": torch.ones(32)})


def test_a_block_that_is_never_called_is_refused() -> None:
    model = tiny_model("llama")
    before, scales = state(model), random_scales(model)
    model.config.num_hidden_layers = 1  # the model runs that many of its layers
    with pytest.raises(SqCpuError, match=r"never calls model\.layers\.1, so its fold cannot"):
        apply_scales(model, scales)
    assert_unchanged(model, before)


def test_only_one_block_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    sizes: list[int] = []
    inner = folding._folded_parameters

    def watched(*args: Any) -> dict[str, Tensor]:
        folded = inner(*args)
        sizes.append(sum(value.numel() for value in folded.values()))
        return folded

    monkeypatch.setattr(folding, "_folded_parameters", watched)
    apply_scales(model, random_scales(model))
    assert len(sizes) == 12  # six proofs, then six folds
    assert max(sizes) <= block


def test_the_proof_leaves_no_trace() -> None:
    model = tiny_model("llama").train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply_scales(model, random_scales(model))
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


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
    scales = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    with torch.no_grad():
        after = model(**ids).logits
    # fp32 eps is 1.2e-7; this network amplifies a relative change of its weights about 100 times.
    assert (after - before).norm() < 1e-4 * before.norm()
    smoothed = found.absmax(down) / scales[down]
    assert smoothed.max() < 100 * smoothed.median()
