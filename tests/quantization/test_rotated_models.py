"""A plan that rotates: quantized, tuned, saved, loaded, streamed and fused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import calibrated
from sameness import assert_same_model
from tiny import batches, change_config, logits, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import Calibration, QuantLinear, SmoothPlan, SqCpuError
from sq_cpu.inference.fusing import fuse
from sq_cpu.kernels.hadamard import fwht64
from sq_cpu.models.groups import is_down, smoothing_groups
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan

DOWN = "model.layers.1.mlp.down_proj"


def rotated(scheme: str, name: str = "llama", *layers: LayerPlan) -> Any:
    model, calibration = calibrated(name, head_dim=8)
    plan = SmoothPlan.uniform(model, calibration, 0.8, hadamard=64)
    return sq_cpu.quantize(model, calibration, replace(plan, layers=layers), scheme=scheme)


def downs(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("down_proj")]


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_saved_and_loaded_it_is_the_same(scheme: str, tmp_path: Path) -> None:
    model = rotated(scheme)
    record = model.sq_cpu_config
    assert record.hadamard == dict.fromkeys(downs(model), 64)
    assert {g.name for g in record.plan.groups if g.hadamard} == {
        name.replace("down", "up") for name in downs(model)
    }
    layer = model.get_submodule(DOWN)
    assert layer.hadamard == 64
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.reference(x))
    out = sq_cpu.save(model, tmp_path / "out")
    loaded = sq_cpu.load(out)
    assert_same_model(loaded, model, logits)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out), model, logits)
    assert loaded.sq_cpu_config == record
    change_config(out, lambda c: c["quantization_config"].pop("hadamard"))
    with pytest.raises(SqCpuError, match=r"down_proj\.hadamard\) not expected"):
        sq_cpu.load(out)
    for bad in ({DOWN: 32}, {DOWN: 0}, {DOWN: True}, {DOWN: 64.0}, [DOWN]):
        change_config(out, lambda c, bad=bad: c["quantization_config"].update(hadamard=bad))
        with pytest.raises(SqCpuError, match="hadamard is not a table of layers and 64"):
            sq_cpu.load(out)


def test_streamed_it_is_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=8)
    model.save_pretrained(tmp_path / "float")
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration, 0.8, hadamard=64)
    sq_cpu.quantize_checkpoint(
        tmp_path / "float", tmp_path / "out", batches(), plan=plan, scheme="O1"
    )
    expected = sq_cpu.quantize(model, calibration, plan, scheme="O1")
    loaded = sq_cpu.load(tmp_path / "out")
    source = tmp_path / "float"
    sq_cpu.quantize_checkpoint(source, tmp_path / "b", batches(), alpha=0.8, hadamard=64)
    assert_same_model(sq_cpu.load(tmp_path / "b"), loaded, logits)
    assert loaded.sq_cpu_config.hadamard == expected.sq_cpu_config.hadamard
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        found, wanted = loaded(ids).logits, expected(ids).logits
    # Later blocks are calibrated on what the quantized ones before them give.
    assert (found - wanted).norm() / wanted.norm() < 0.05


def test_without_a_plan_it_is_a_setting() -> None:
    model, calibration = calibrated("llama", head_dim=8)
    plan = SmoothPlan.uniform(model, calibration, hadamard=64)
    found = sq_cpu.quantize(model, calibration, scheme="O3", hadamard=64)
    assert found.sq_cpu_config.plan == plan
    model, calibration = calibrated("llama", head_dim=8)
    found = sq_cpu.quantize(model, calibration, scheme="O3", hadamard=0)
    assert found.sq_cpu_config.hadamard == {}


# Attention wider than the hidden state, experts narrower than it, an MLP without a gate.
@pytest.mark.parametrize(
    ("name", "config", "down"),
    [
        ("qwen3", {"head_dim": 32}, ("mlp.down_proj",)),
        ("qwen3_moe", {"head_dim": 32}, ("down_proj",)),
        ("opt", {}, ("fc2",)),
        ("gpt2", {}, ("mlp.c_proj",)),
        ("gpt_neox", {}, ("mlp.dense_4h_to_h",)),
        ("t5", {}, (".wo",)),
        ("vit", {}, ("mlp.fc2",)),
    ],
)
def test_down_projections_alone_are_rotated(
    name: str, config: dict[str, int], down: tuple[str, ...]
) -> None:
    model = tiny_model(name, **config)
    with linearized(model):
        found = {n for g in smoothing_groups(model) if is_down(model, g) for n in g.consumers}
        linears = quantizable_linears(model)
    assert found == {each for each in linears if each.endswith(down)}
    assert found


def test_where_nothing_can_be_rotated_it_is_refused(tmp_path: Path) -> None:
    model, calibration = calibrated("llama", head_dim=8)
    scheme = Scheme.of("O1", ignore=("lm_head", *downs(model)))
    refused = pytest.raises(SqCpuError, match="hadamard=64 rotates the inputs of down projections")
    with refused:
        sq_cpu.quantize(model, calibration, scheme=scheme, hadamard=64)
    with refused:
        sq_cpu.tune(model, calibration, scheme=scheme, hadamard=64)
    with refused:
        SmoothPlan.uniform(model, calibration, ignore=scheme.ignore, hadamard=64)
    model.save_pretrained(tmp_path / "float")
    with refused:
        sq_cpu.quantize_checkpoint(
            tmp_path / "float", tmp_path / "out", batches(), scheme=scheme, hadamard=64
        )
    assert sq_cpu.quantize(model, calibration, hadamard=64).sq_cpu_config.hadamard


def test_experts_and_channels_in_float_are_rotated_too(tmp_path: Path) -> None:
    model = rotated("O1", "mixtral")
    assert sum(".experts." in name for name in model.sq_cpu_config.hadamard) == 8
    model = rotated("O3", "llama", LayerPlan(name=DOWN, outliers=(3, 7)))
    layer = model.get_submodule(DOWN)
    assert isinstance(layer, DecomposedLinear)
    assert layer.regular.hadamard == 64
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.reference(x))
    assert_same_model(sq_cpu.load(sq_cpu.save(model, tmp_path / "out")), model, logits)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_fused_it_is_close_to_the_plain_model(scheme: str) -> None:
    model = rotated(scheme)
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(5))
    plain = model(ids).logits
    fuse(model)
    made = model(ids).logits
    assert not torch.equal(made, plain)  # the program made them
    # Int8 keys and values, and codes that they turn over in each layer: up to 4 % here.
    assert (made - plain).norm() / plain.norm() < 0.08


def test_tune_scores_it_rotated() -> None:
    model, calibration = calibrated("llama", head_dim=8)
    plan = sq_cpu.tune(model, calibration, scheme="O3", alphas=(0.4, 0.8, 0.2), hadamard=64)
    without = sq_cpu.tune(model, calibration, scheme="O3", alphas=(0.4, 0.8, 0.2), hadamard=0)
    assert {g.hadamard for g in plan.groups if g.name.endswith("up_proj")} == {64}
    for found, before in zip(plan.groups, without.groups, strict=True):
        assert (found.curve == before.curve) == (found.hadamard == 0)
    assert SmoothPlan.from_json(plan.to_json()) == plan
    sq_cpu.quantize(model, calibration, plan)


def test_tune_rotates_where_that_pays() -> None:
    model = tiny_model("llama", head_dim=64)
    with torch.no_grad():  # an outlier before the first down, and one before the first output
        model.model.layers[0].mlp.up_proj.weight[5] *= 100
        model.model.layers[0].mlp.down_proj.weight[:, 5] /= 4
        model.model.layers[0].self_attn.v_proj.weight[7] *= 100
        model.model.layers[0].self_attn.o_proj.weight[:, 7] /= 4
    for gradient_rows in (0, 64):
        calibration = sq_cpu.calibrate(model, batches(4), gradient_rows=gradient_rows)
        loss = "kl" if gradient_rows else "nmse"
        settings: dict[str, Any] = {"alphas": (0.4, 0.6, 0.2), "scheme": "O1", "outliers": 0}
        plan = sq_cpu.tune(model, calibration, **settings)
        without = sq_cpu.tune(model, calibration, hadamard=0, **settings)
        rotated = {g.name: g for g in plan.groups if g.rotation}
        assert rotated["model.layers.0.mlp.up_proj"].hadamard == 64
        assert rotated["model.layers.0.self_attn.v_proj"].hadamard_fold == 64
        for found, before in zip(plan.groups, without.groups, strict=True):
            value = float(before.note.removeprefix(f"{loss} "))
            if not found.rotation:
                assert found == before
                continue
            note, after = found.note.split("; ")
            assert note == f"{loss} {value:.3g} not rotated"
            assert float(after.removeprefix(f"{loss} ")) <= 0.985 * value
        blocks = sq_cpu.tune(model, calibration, block_wise=True, **settings)
        assert any(group.hadamard for group in blocks.groups)
    few = replace(calibration, peaks={}, peak_folds={})
    plan = sq_cpu.tune(model, few, **(settings | {"scheme": "O3"}))
    assert not any(group.rotation for group in plan.groups)
    up = next(group for group in plan.groups if group.name == "model.layers.0.mlp.up_proj")
    assert up.note.startswith("not rotated: the calibration holds no sampled rows and peaks; kl ")


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@torch.no_grad()
def test_values_are_rotated_in_the_weights(scheme: str, tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=64, attention_bias=True)
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration, hadamard=0)
    name = "model.layers.1.self_attn.v_proj"
    groups = [replace(g, hadamard_fold=64) if g.name == name else g for g in plan.groups]
    plan = replace(plan, groups=tuple(groups), scheme=Scheme.of(scheme))
    assert SmoothPlan.from_json(plan.to_json()) == plan
    expected = logits(model)
    sq_cpu.quantize(model, calibration, plan)
    record = model.sq_cpu_config
    assert record.plan == plan
    assert record.hadamard == {}  # nothing is done at run time
    assert model.model.layers[1].self_attn.o_proj.hadamard == 0
    assert (logits(model) - expected).norm() / expected.norm() < 0.05
    loaded = sq_cpu.load(sq_cpu.save(model, tmp_path / "out"))
    assert_same_model(loaded, model, logits)
    assert loaded.sq_cpu_config == record
    other = tiny_model("llama", head_dim=48)
    calibration = sq_cpu.calibrate(other, batches())
    with pytest.raises(SqCpuError, match=r"v_proj: hadamard_fold is 64, and 16 is what fits"):
        sq_cpu.quantize(other, calibration, plan)


def sampled(columns: int) -> LinearSample:
    torch.manual_seed(0)
    x = torch.randn(40, columns)
    x[:, 3] *= 50
    weight = 0.1 * torch.randn(24, columns)
    return LinearSample(weight, x, x.amin(0), x.amax(0), peaks=x[:8], name="fc")


@pytest.mark.parametrize("columns", [48, 64, 100])
@pytest.mark.parametrize("outliers", [(), (3, 5)])
@pytest.mark.parametrize(
    "scheme", [*map(Scheme.of, ("O1", "O2", "O3")), Scheme.of("O3", static_range="minmax")]
)
@torch.no_grad()
def test_a_fake_quantized_linear_computes_what_the_layer_does(
    columns: int, outliers: tuple[int, ...], scheme: Scheme
) -> None:
    sample = replace(sampled(columns), outliers=outliers)
    s = torch.linspace(0.5, 2.0, columns)
    fake = FakeQuantizedLinear(sample, s, scheme, 0.9, 64)
    linear = nn.Linear(columns, 24, bias=False)
    linear.weight.data = sample.weight
    x: Tensor = sample.inputs()
    static = fake.range if scheme.activations == "static" else None
    options: dict[str, Any] = {"smoothing": s, "hadamard": 64}
    layer: Any
    if outliers:
        channels = torch.tensor(outliers)
        layer = DecomposedLinear.from_float(linear, fake.scheme, channels, static, **options)
    else:
        layer = QuantLinear.from_float(linear, fake.scheme, static, **options)
    y = layer(x)
    # 1 / s and x / s round differently, and may turn a code over: a step of both sides.
    torch.testing.assert_close(fake(x), y, rtol=0, atol=float(2**-7 * y.abs().max()))
    if scheme.static_range == "minmax":
        rest = (sample.peaks / s).index_fill(1, torch.tensor(outliers, dtype=torch.int64), 0.0)
        reach = fwht64(rest)
        assert static == pytest.approx((0.9 * float(reach.min()), 0.9 * float(reach.max())))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=r"group up: hadamard is 32; blocks are of 64"):
        GroupPlan(name="up", hadamard=32)
    model, calibration = calibrated("llama", head_dim=8)
    plan = SmoothPlan.uniform(model, calibration, hadamard=64)
    refused = pytest.raises(SqCpuError, match=r"no peaks of .*down_proj.*again, with rows=64")
    for count in (0, 1):  # none, and none of the folds but one
        peaks = {name: rows[:count] for name, rows in calibration.peaks.items()}
        folds = {name: torch.zeros(count, dtype=torch.uint8) for name in peaks}
        few = replace(calibration, peaks=peaks, peak_folds=folds)
        few = Calibration.load(few.save(tmp_path / f"calibration-{count}"))
        with refused:
            sq_cpu.tune(model, few, scheme="O3", alphas=(0.5, 0.5, 0.1), hadamard=64)
        if not count:
            with refused:
                sq_cpu.quantize(model, few, plan, scheme="O3")
    without = replace(calibration, peaks={}, peak_folds={})
    with refused:
        sq_cpu.quantize(model, without, plan, scheme="O3")
    sq_cpu.quantize(model, without, plan, scheme="O1")
    path = plan.save(tmp_path / "plan.json")
    assert SmoothPlan.load(path) == plan
    assert "hadamard" not in json.dumps(
        SmoothPlan.uniform(*calibrated("llama", head_dim=8), hadamard=0).to_dict()
    )
