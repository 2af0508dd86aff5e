"""quantize: validate, fold, swap; and a model that is left alone when it cannot be quantized."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from quantize_cases import Twice, calibrated, refuse
from sameness import assert_same_model
from tiny import batches, logits, mixed_plan, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.linears import linearize
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_weight, static_code
from sq_cpu.quantization.quantize import quantize
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Activations, Scheme, StaticRange, Weights
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan
from sq_cpu.smoothing.smooth import fold

TYPES = ["llama", "qwen2", "opt"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_scheme_runs_close_to_float(model_type: str, scheme: str) -> None:
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


EVERY_SCHEME = [
    Scheme(
        activations=activations,
        weights=weights,
        symmetric=symmetric,
        reduce_range=reduce_range,
        static_range=static_range,
        # Groups of 5 leave a shorter one at the end of each of the model's widths.
        **({"rows_per_scale": 5} if weights == "per_rows" else {}),
        **({"percentile": 99.9} if static_range == "percentile" else {}),
    )
    for activations, weights, symmetric, reduce_range, static_range in itertools.product(
        get_args(Activations),
        get_args(Weights),
        (True, False),
        (False, True),
        get_args(StaticRange),
    )
    if activations == "static" or static_range == "auto"
]


@pytest.fixture(scope="module")
def one_block() -> tuple[Any, Calibration]:
    return calibrated("llama", num_hidden_layers=1)


@pytest.mark.parametrize(
    "scheme", EVERY_SCHEME, ids=lambda s: "-".join(map(str, s.to_dict().values()))
)
def test_every_scheme_runs_as_its_reference_and_is_saved(
    scheme: Scheme,
    one_block: tuple[Any, Calibration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, found = copy.deepcopy(one_block[0]), one_block[1]
    before = logits(model)
    kernels = logits(quantize(model, found, scheme=scheme))
    # 8 bits give each product about 1 % noise and 7 bits 2 %; one block of random weights stays
    # below 6.
    assert 0 < relative_error(kernels, before) < 0.06
    loaded = load(save(model, tmp_path / "out"))
    assert loaded.sq_cpu_config.scheme == scheme
    assert_same_model(loaded, model, logits)
    rows = {"per_channel": 1, "per_rows": 5, "per_tensor": 32}[scheme.weights]
    scale = loaded.model.layers[0].mlp.down_proj.weight_scale
    assert len(scale.unique_consecutive()) == -(-32 // rows)
    monkeypatch.setattr(QuantLinear, "forward", QuantLinear.reference)
    torch.testing.assert_close(logits(model), kernels, rtol=0, atol=2.0**-20)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["auto", "percentile", "mse"])
def test_clipped_ranges_are_those_of_the_smoothed_rows(kind: Any, symmetric: bool) -> None:
    model, found = calibrated("opt")
    plan = SmoothPlan.uniform(model, found, alpha=0.8, hadamard=0)
    scales = fold(copy.deepcopy(model), plan, found).scales
    scheme = Scheme.of("O3", static_range=kind, symmetric=symmetric)
    quantize(model, found, plan, scheme=scheme)
    for name, s in scales.items():
        low, high = found.channels(name)
        ends = static_range(low / s, high / s, found.rows[name] / s, scheme)
        layer = model.get_submodule(name)
        assert (layer.input_scale, layer.input_zero_point) == static_code(scheme, *ends)


def test_static_ranges_are_the_calibrated_ones_divided_by_s() -> None:
    model, found = calibrated("opt")
    plan = SmoothPlan.uniform(model, found, alpha=0.8, hadamard=0)
    scales = fold(copy.deepcopy(model), plan, found).scales
    quantize(model, found, plan, scheme=Scheme.of("O3", static_range="minmax"))
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


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_any_module_is_smoothed_in_the_pass(scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    x[:, 3] *= 100
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:, 3] /= 100
    naive, before = copy.deepcopy(model), model(x).detach()
    found = calibrate(model, [x])
    quantize(naive, found, scheme=scheme, smooth=False)
    record = quantize(model, found, scheme=scheme, hadamard=0).sq_cpu_config
    assert record.smoothed == record.layers == ("0", "2")
    assert [group.name for group in record.plan.groups] == ["0.input", "2.input"]
    assert all(group.note == "no family row for 'Sequential'" for group in record.plan.groups)
    assert relative_error(model(x), before) < 0.2 * relative_error(naive(x), before)
    assert isinstance(model[0], QuantLinear)


def test_mixtures_of_experts_are_copied_and_pickled_and_hold_no_float_twice() -> None:
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1)
    few = [torch.tensor([[1, 2, 3, 4]])]
    quantize(model, calibrate(model, few), scheme="O3")
    kept = [p for n, p in model.named_parameters() if "experts" in n]
    assert kept
    # Those that no token was routed to; views would keep all the others alive.
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in kept)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_model(twin, model, logits)


def test_matrices_of_other_modules_are_accounted_for() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    record = quantize(model, smooth=False).sq_cpu_config
    assert record.layers == ("head",)
    assert record.kept == {
        "attention.in_proj_weight": "a matrix of a MultiheadAttention, no linear",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, which may compute something else",
    }


def test_a_tied_head_is_quantized_apart_from_the_embedding() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding, before = model.model.embed_tokens.weight.clone(), logits(model)
    found = calibrate(model, batches(), ignore=())
    quantize(model, found, scheme=Scheme(ignore=()))
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert relative_error(logits(model), before) < 0.08


def test_an_ignored_tied_head_stays_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    quantize(model, calibrate(model, batches()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


# --- plans that mix ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "opt-350m", "mixtral"])
def test_mixed_plans_are_carried_out_linear_by_linear(
    model_type: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = calibrated(model_type)
    plan = mixed_plan(model, found, Scheme.of(scheme))
    before, folded = logits(model), copy.deepcopy(model)
    record = quantize(model, found, plan).sq_cpu_config
    smoothed = fold(folded, SmoothPlan(record.plan.groups), found)
    linearize(folded)
    groups = {group.name: group for group in smoothing_groups(folded)}
    idle = {name for name, g in groups.items() if plan.in_float.keys() >= {*g.consumers}}
    assert [g.name for g in record.plan.groups] == [
        g.name for g in plan.groups if g.name not in idle
    ]
    clips = {name: g.clip for g in plan.groups for name in groups[g.name].consumers}
    assert record.scheme == Scheme.of(scheme)
    assert record.plan.layers == plan.layers
    assert {*record.layers, *plan.in_float} == found.channel_min.keys()
    kinds = set()
    for name in found.channel_min:
        layer, planned = model.get_submodule(name), plan.layer(name)
        at_run_time, s = name in smoothed.at_run_time, smoothed.scales.get(name)
        weight = folded.get_submodule(name).weight
        outliers = torch.tensor(planned.outliers, dtype=torch.int64)
        if planned.outliers:
            assert torch.equal(layer.columns, outliers)
            kept = weight[:, outliers]
            assert torch.equal(layer.outlier_weight, kept)
            assert record.decomposed[name] == len(outliers)
            layer = layer.regular
        kinds.add((type(layer), getattr(layer, "scheme", None), planned.weight_clip))
        if planned.in_float:
            assert record.kept[name] == (planned.note or "the plan keeps it in float")
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, weight)
            continue
        assert layer.scheme == plan.layer_scheme(Scheme.of(scheme), name)
        assert (name in record.smoothed) == (at_run_time and not planned.outliers)
        assert (layer.smoothing is not None) == (at_run_time or bool(planned.outliers))
        weight = (weight * s if at_run_time else weight).index_fill(1, outliers, 0)
        codes, scale = quantize_weight(weight, clip=planned.weight_clip)
        assert torch.equal(layer.weight_int8(), codes)
        assert torch.equal(layer.weight_scale, scale)
        if layer.scheme.activations == "static":
            seen = (*found.channels(name), found.rows[name])
            low, high, rows = ((each / s).index_fill(-1, outliers, 0) for each in seen)
            ends = [clips[name] * end for end in static_range(low, high, rows, layer.scheme)]
            assert layer.input_scale == static_code(layer.scheme, *ends)[0]
        else:
            assert layer.input_scale is None
    assert kinds >= {
        (nn.Linear, None, 1.0),
        (QuantLinear, Scheme.of("O3"), 1.0),
        (QuantLinear, Scheme.of("O2"), 0.6),
        (QuantLinear, Scheme.of("O1"), 1.0),
        (QuantLinear, Scheme.of(scheme), 0.8),
    }
    kernels = logits(model)
    # As loosely quantized as a weight clip of 0.6 and a static clip of 0.5 make it.
    assert 0 < relative_error(kernels, before) < 0.6
    monkeypatch.setattr(QuantLinear, "forward", QuantLinear.reference)
    torch.testing.assert_close(logits(model), kernels, rtol=0, atol=2.0**-20)


def test_a_float_linear_beside_others_that_are_smoothed_in_the_pass_is_untouched() -> None:
    model, found = calibrated("opt-350m")  # post-norm: nothing takes s before q, k and v
    attention = "model.decoder.layers.1.self_attn"
    original = model.get_submodule(attention).q_proj.weight.clone()
    plan = SmoothPlan.uniform(model, found, hadamard=0)
    plan = replace(plan, layers=(LayerPlan(name=f"{attention}.q_proj", in_float=True),))
    record = quantize(model, found, plan).sq_cpu_config
    assert record.plan == plan
    smoothed = [name for name in record.smoothed if name.startswith(attention)]
    assert smoothed == [f"{attention}.{name}_proj" for name in ("k", "v")]
    linear = model.get_submodule(f"{attention}.q_proj")
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, original)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", get_args(StaticRange))
def test_a_clip_scales_the_static_range_that_was_found(kind: Any, symmetric: bool) -> None:
    scheme = Scheme.of("O3", static_range=kind, symmetric=symmetric)
    found, scales, plain = None, {}, None
    for clip in (1.0, 0.5, 2.0):
        model, found = calibrated("opt")
        uniform = SmoothPlan.uniform(model, found, alpha=0.8, hadamard=0)
        plan = replace(uniform, groups=tuple(replace(g, clip=clip) for g in uniform.groups))
        quantize(model, found, plan, scheme=scheme)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        scales = {name: layer.input_scale for name, layer in layers.items()}
        plain = plain or scales
        # Powers of two: exact.
        assert scales == {name: clip * scale for name, scale in plain.items()}
        assert len({layer.input_zero_point for layer in layers.values()}) == 1 or not symmetric


def test_a_clip_has_no_effect_on_dynamic_linears() -> None:
    model, found = calibrated("llama")
    other = copy.deepcopy(model)
    plan = SmoothPlan.uniform(model, found)
    clipped = replace(plan, groups=tuple(replace(g, clip=0.25) for g in plan.groups))
    for scheme in ("O1", "O2"):
        plain, same = copy.deepcopy(model), copy.deepcopy(other)
        quantize(plain, found, plan, scheme=scheme)
        quantize(same, found, clipped, scheme=scheme)
        assert_same_model(plain, same, logits)


def test_a_group_of_float_linears_is_left_as_it_is() -> None:
    for model_type in ("llama", "gpt2"):
        model = tiny_model(model_type, dtype=torch.bfloat16)  # where folding would round
        found, before = calibrate(model, batches()), copy.deepcopy(model)
        plan = SmoothPlan.uniform(model, found, rule="aqas")
        linearize(before)
        groups = [g for g in smoothing_groups(before) if g.consumers[0] in found.channel_min]
        first, second = groups[1], groups[2]
        layers = [LayerPlan(name=name, in_float=True) for name in first.consumers]
        layers += [LayerPlan(name=name, in_float=True) for name in second.consumers[1:]]
        record = quantize(model, found, replace(plan, layers=tuple(layers))).sq_cpu_config
        names = [group.name for group in record.plan.groups]
        assert names == [g.name for g in plan.groups if g.name != first.name]
        for name in first.consumers:
            assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
        # Of the other group one linear is quantized.
        assert second.consumers[0] in record.layers


def test_the_scheme_is_the_given_one_else_the_plans_else_o1() -> None:
    model, found = calibrated("llama")
    plan = SmoothPlan.uniform(model, found, hadamard=0)
    for given, of_plan, expected in (
        (None, None, "O1"),
        (None, "O3", "O3"),
        ("O2", "O3", "O2"),
    ):
        planned = replace(plan, scheme=None if of_plan is None else Scheme.of(of_plan))
        record = quantize(copy.deepcopy(model), found, planned, scheme=given).sq_cpu_config
        assert (record.scheme.name, record.plan) == (expected, planned)
    assert quantize(copy.deepcopy(model), found).sq_cpu_config.scheme.name == "O1"


def test_only_what_rests_on_a_calibration_needs_one() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 8)
    found = calibrate(model, [x])
    dynamic = SmoothPlan((), (LayerPlan(name="first", activations="per_tensor"),))
    record = quantize(copy.deepcopy(model), plan=dynamic).sq_cpu_config
    assert (record.plan, record.layers) == (dynamic, ("first", "rest.2"))
    static = SmoothPlan((), (LayerPlan(name="rest.2", activations="static"),))
    refuse(model, "static activation scales .* need a calibration", None, static)
    quantize(model, found, static)
    assert model.first.input_scale is None
    scheme, seen = model.rest[2].scheme, (*found.channels("rest.2"), found.rows["rest.2"])
    expected = static_code(scheme, *static_range(*seen, scheme))
    assert (model.rest[2].input_scale, model.rest[2].input_zero_point) == expected


def test_a_fold_that_would_change_the_model_is_divided_in_the_pass() -> None:
    model, _ = calibrated("opt")
    model.model.decoder.layers[0].activation_fn = nn.GELU()
    found, before = calibrate(model, batches()), logits(model)
    record = quantize(model, found, scheme="O3").sq_cpu_config
    assert record.smoothed == ("model.decoder.layers.0.fc2",)
    (group,) = (group for group in record.plan.groups if not group.fold)
    assert group.name == "model.decoder.layers.0.fc1"
    assert group.note.endswith("activation_fn (GELU) takes the output of " + group.name)
    assert relative_error(logits(model), before) < 0.08
