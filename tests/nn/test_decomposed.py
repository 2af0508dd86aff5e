"""LLM.int8(): outlier channels in float beside int8 ones, one layer and whole models."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import assert_same_model
from tiny import batches, change_config, inputs, logits, tiny_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import LayerPlan, QuantLinear, Scheme, SmoothPlan, SqCpuError
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.nn.decomposed import DecomposedLinear, decomposed_reference
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_weight, static_code
from sq_cpu.smoothing.scales import plan_scales
from sq_cpu.streaming.convert import linear_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K, N = 70, 20
COUNTS = {"none": [], "one": [69], "some": [0, 3, 17, 64], "all": list(range(K))}
LLM_INT8 = Scheme(outlier_threshold=6.0)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def make(
    columns: list[int], dtype: torch.dtype, *, bias: bool = True, scheme: Scheme = LLM_INT8
) -> tuple[DecomposedLinear, nn.Linear, torch.Tensor]:
    """Give a layer, what it was made of, and an input whose outliers give exact float products.

    Products of integers up to 3 sum to at most 70 * 9 = 630 < 2^11: exact in fp16, and in fp32
    before the one rounding to bf16.
    """
    linear = nn.Linear(K, N, bias=bias)
    x = torch.randn(9, K)
    linear.weight[:, columns] = integers(N, len(columns))
    x[:, columns] = integers(9, len(columns))
    linear = linear.to(dtype)
    layer = DecomposedLinear.from_float(linear, scheme, torch.tensor(columns, dtype=torch.int64))
    return layer, linear, x.to(dtype)


# --- one layer ----------------------------------------------------------------------------------


def outlier_columns(absmax: torch.Tensor, threshold: float) -> torch.Tensor:
    return (absmax >= threshold).nonzero().flatten()


def test_the_reference_by_hand() -> None:
    # Column 1 is float: 10 * 0.5. The rest: codes 127 and 64 (63.5 to even) of 1 and 0.5.
    x = torch.tensor([[1.0, 10.0, 0.5]])
    weight = torch.tensor([[2, 0, 1]], dtype=torch.int8)
    y = decomposed_reference(
        x,
        weight,
        torch.ones(1),
        torch.tensor([3.0]),
        torch.tensor([1]),
        torch.tensor([[0.5]]),
        Scheme(),
    )
    assert y.item() == pytest.approx((2 * 127 + 64) / 127 + 3 + 5, rel=2**-23)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COUNTS.values(), ids=COUNTS)
def test_the_layer_equals_the_reference(
    each_isa: str, columns: list[int], dtype: torch.dtype, bias: bool
) -> None:
    for scheme in (LLM_INT8, Scheme(outlier_threshold=6, reduce_range=True, weights="per_tensor")):
        layer, linear, x = make(columns, dtype, bias=bias, scheme=scheme)
        assert torch.equal(layer(x), layer.reference(x))
        assert torch.equal(layer(x[0]), layer.reference(x[0]))
        # From the definition: the codes are those of a weight without the outlier columns.
        rest = linear.weight.float().index_fill(1, layer.columns, 0)
        codes, scale = quantize_weight(rest, scheme.weights)
        y = decomposed_reference(
            x, codes, scale, layer.regular.bias, layer.columns, linear.weight[:, columns], scheme
        )
        assert torch.equal(layer(x), y)
        assert (layer.regular.bias is None) == (not bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", COUNTS.values(), ids=COUNTS)
def test_static_activations(each_isa: str, columns: list[int], symmetric: bool) -> None:
    _, linear, x = make(columns, torch.float32)
    scheme = Scheme.of("O3", symmetric=symmetric)
    s = torch.rand(K) + 0.5
    rest = (x / s).index_fill(1, torch.tensor(columns, dtype=torch.int64), 0)
    ends = float(rest.min()), float(rest.max())
    layer = DecomposedLinear.from_float(
        linear, scheme, torch.tensor(columns, dtype=torch.int64), ends, smoothing=s
    )
    assert layer.regular.static == static_code(scheme, *ends)
    assert torch.equal(layer(x), layer.reference(x))
    # A massive activation is no matter of the others' codes.
    x[3, columns] = 2.0**12
    y = layer(x)
    assert torch.equal(y, layer.reference(x))
    torch.testing.assert_close(y, linear(x), rtol=1e-4, atol=0.15)


def test_a_weight_clip_is_of_the_int8_channels() -> None:
    _, linear, _ = make(COUNTS["some"], torch.float32)
    columns = torch.tensor(COUNTS["some"])
    layer = DecomposedLinear.from_float(linear, LLM_INT8, columns, weight_clip=0.5)
    codes, scale = quantize_weight(linear.weight.index_fill(1, columns, 0), clip=0.5)
    assert torch.equal(layer.regular.weight_int8(), codes)
    assert torch.equal(layer.regular.weight_scale, scale)
    assert torch.equal(layer.outlier_weight, linear.weight[:, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_outliers_it_is_the_int8_layer(dtype: torch.dtype) -> None:
    layer, linear, x = make([], dtype)
    assert torch.equal(layer(x), QuantLinear.from_float(linear, Scheme())(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_outliers_alone_it_is_the_float_layer(dtype: torch.dtype) -> None:
    layer, linear, x = make(COUNTS["all"], dtype)
    assert torch.equal(layer(x), (x.float() @ linear.weight.float().T).to(dtype) + linear.bias)


@pytest.mark.parametrize("size", [2.0**-66, 1.0, 2.0**10, 2.0**98])
def test_outliers_of_any_size_leave_the_others_codes(size: float) -> None:
    layer, _, x = make(COUNTS["some"], torch.float32)
    x[:, layer.columns] *= size
    regular = layer.regular
    hidden = regular.quantize_input(x)
    assert torch.equal(
        hidden.scale, regular.quantize_input(x.index_fill(1, layer.columns, 0)).scale
    )
    assert torch.equal(layer(x), layer.reference(x))  # powers of two: exact products


def test_it_errs_less_than_int8_where_there_are_outliers() -> None:
    linear = nn.Linear(256, 64)
    x = torch.randn(40, 256)
    x[:, [3, 100]] *= 60
    columns = outlier_columns(x.abs().amax(0), 6.0)
    assert columns.tolist() == [3, 100]
    y = linear(x)
    decomposed = DecomposedLinear.from_float(linear, LLM_INT8, columns)(x) - y
    naive = QuantLinear.from_float(linear, Scheme())(x) - y
    # The step of a row's codes falls from about 120 / 127 to 3 / 127.
    assert decomposed.norm() < naive.norm() / 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smoothing_divides_the_channels_that_are_int8(dtype: torch.dtype) -> None:
    linear = nn.Linear(K, N).to(dtype)
    columns = torch.tensor(COUNTS["some"])
    s = 2.0 ** torch.randint(-4, 5, (K,))
    layer = DecomposedLinear.from_float(linear, LLM_INT8, columns, smoothing=s)
    folded = nn.Linear(K, N).to(dtype)
    # Powers of two: exact. The outlier channels are not smoothed.
    here = s.index_fill(0, columns, 1)
    folded.weight.copy_(linear.weight * here.to(dtype))
    folded.bias.copy_(linear.bias)
    x = torch.randn(9, K).to(dtype)
    expected = DecomposedLinear.from_float(folded, LLM_INT8, columns)(x / here.to(dtype))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(dtype: torch.dtype) -> None:
    layer, _, x = make(COUNTS["some"], dtype)
    x[1, 3] = float("nan")  # an outlier channel
    x[2, 3] = float("inf")
    x[3, 4] = -float("inf")
    x[5] = 0
    y = layer(x)
    bad = torch.tensor([False, True, True, True] + 5 * [False])
    assert y[bad].isnan().all()
    assert torch.equal(y[~bad], layer(x[~bad]))
    assert torch.equal(y.nan_to_num(), layer.reference(x).nan_to_num())


def test_shapes_and_strides() -> None:
    layer, _, x = make(COUNTS["some"], torch.float32)
    y = layer(x)
    assert layer(x[:0]).shape == (0, N)
    assert torch.equal(layer(x.reshape(3, 3, K)), y.reshape(3, 3, N))
    assert torch.equal(layer(torch.cat([x, x], 1)[:, :K]), y)
    assert torch.equal(layer(x.T.contiguous().T), y)
    assert (layer.in_features, layer.out_features) == (K, N)
    traced: Any = make_fx(layer)(x)
    assert torch.equal(traced(x), y)


def test_another_float_dtype_than_its_own() -> None:
    layer, _, x = make(COUNTS["some"], torch.float32)
    for dtype in DTYPES:  # integers: what is cast is exact
        assert torch.equal(layer(x.to(dtype)), layer.reference(x.to(dtype)))
        assert torch.equal(copy.deepcopy(layer).to(dtype)(x), layer(x))


def test_state_dict_round_trip_and_copies() -> None:
    layer, _, x = make(COUNTS["some"], torch.float32)
    state = layer.state_dict()
    assert set(state) == {
        "columns",
        "outlier_weight",
        "regular.weight",
        "regular.weight_scale",
        "regular.bias",
        "regular.smoothing",
    }
    assert not state["regular.weight"][:, layer.columns].any()
    other = DecomposedLinear.empty(K, N, LLM_INT8, 4, bias=True)
    other.load_state_dict(state)
    other.check()
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert layer.nbytes == layer.regular.nbytes + 4 * 8 + 4 * N * 4
    assert "outliers=4" in repr(layer)


def test_columns_that_the_int8_part_does_not_leave_out_are_refused() -> None:
    layer, _, _ = make(COUNTS["some"], torch.float32)
    layer.check()
    layer.columns[1] = 4
    with pytest.raises(SqCpuError, match="columns are not those that smoothing hides"):
        layer.check()


@pytest.mark.parametrize("columns", [[3, 1], [1, 1], [-1, 2], [K], [[1]], [0.5]])
def test_bad_columns_are_refused(columns: list[Any]) -> None:
    with pytest.raises(SqCpuError, match="ascending channels, int64, of 70"):
        DecomposedLinear.from_float(nn.Linear(K, N), LLM_INT8, torch.tensor(columns))


def test_bad_input_is_one_clear_line() -> None:
    layer, linear, _ = make(COUNTS["some"], torch.float32)
    with pytest.raises(SqCpuError, match=r"input is torch.float64; use float32"):
        layer(torch.zeros(2, K, dtype=torch.float64))
    with pytest.raises(SqCpuError, match=r"input is \[2, 7\], the layer needs \[..., 70\]"):
        layer(torch.zeros(2, 7))
    for column in (3, 4):
        broken = copy.deepcopy(linear)
        broken.weight[0, column] = float("nan")
        with pytest.raises(SqCpuError, match="a weight holds NaN or Inf"):
            DecomposedLinear.from_float(broken, LLM_INT8, layer.columns)


# --- whole models -------------------------------------------------------------------------------


def planted(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Give a tiny model with two channels of outliers behind every norm, planted exactly."""
    model = tiny_model(model_type, dtype=dtype)
    for group in smoothing_groups(model):
        if "norm" in group.name:
            for parameter in model.get_submodule(group.name).parameters():
                parameter[[3, 17]] *= 64
            for consumer in group.consumers:
                model.get_submodule(consumer).weight[:, [3, 17]] /= 64
    return model


def decomposed(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = planted(model_type, dtype)
    calibration = sq_cpu.calibrate(model, batches())
    return sq_cpu.quantize(model, calibration, scheme=LLM_INT8, smooth=False)


def test_only_linears_with_outliers_are_decomposed() -> None:
    float_model, model = planted(), decomposed()
    record = model.sq_cpu_config
    behind_norms = {f"model.layers.{i}.{name}" for i in (0, 1) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"
    )}  # fmt: skip
    assert behind_norms <= set(record.decomposed)
    calibration = sq_cpu.calibrate(float_model, batches())
    for name in record.layers:
        layer, expected = model.get_submodule(name), calibration.absmax(name) >= 6
        assert isinstance(layer, DecomposedLinear) == (name in record.decomposed) == expected.any()
        if isinstance(layer, DecomposedLinear):
            assert layer.columns.tolist() == expected.nonzero().flatten().tolist()
            assert record.decomposed[name] == len(layer.columns)
    naive = sq_cpu.quantize(planted(), scheme="O1", smooth=False)
    y = logits(float_model)
    assert (logits(model) - y).norm() < 0.5 * (logits(naive) - y).norm()


def test_outliers_are_those_of_the_smoothed_input() -> None:
    model = planted()
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration, 1.0)
    sq_cpu.quantize(model, calibration, plan, scheme=LLM_INT8)
    # At alpha = 1 every smoothed channel has an absmax of 1.
    assert model.sq_cpu_config.decomposed == {}


BEHIND_NORMS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_channels_that_a_plan_keeps_in_float(scheme: str, tmp_path: Path) -> None:
    float_model = planted()
    calibration = sq_cpu.calibrate(float_model, batches())
    outliers = {name: (3, 17) for name in calibration.channel_min if name.endswith(BEHIND_NORMS)}
    uniform = SmoothPlan.uniform(float_model, calibration, 0.4)
    layers = tuple(LayerPlan(name=name, outliers=columns) for name, columns in outliers.items())
    plan = SmoothPlan.from_json(replace(uniform, layers=layers).to_json())
    assert plan.layers == layers
    model = sq_cpu.quantize(planted(), calibration, plan, scheme=scheme)
    assert model.sq_cpu_config.decomposed == dict.fromkeys(outliers, 2)
    for name, module in model.named_modules():
        if name in outliers:
            assert module.columns.tolist() == [3, 17]
            if scheme == "O3":  # of the other channels, smoothed
                group = next(g for g in smoothing_groups(float_model) if name in g.consumers)
                planned = SmoothPlan(tuple(g for g in plan.groups if g.name == group.name))
                (s,) = plan_scales(float_model, planned, calibration).values()
                seen = (*calibration.channels(name), calibration.rows[name])
                rest = ((each / s).index_fill(-1, module.columns, 0) for each in seen)
                _, end = static_range(*rest, Scheme.of("O3"))
                assert module.regular.input_scale == pytest.approx(end / 127)
    loaded = sq_cpu.load(sq_cpu.save(model, tmp_path / "out"))
    assert_same_model(loaded, model, logits)
    alone = sq_cpu.quantize(planted(), calibration, SmoothPlan((), layers), scheme=scheme)
    naive = sq_cpu.quantize(planted(), calibration, scheme=scheme, smooth=False)
    y = logits(float_model)
    assert (logits(alone) - y).norm() < 0.5 * (logits(naive) - y).norm()

    beyond = replace(uniform, layers=(LayerPlan(name=next(iter(outliers)), outliers=(3, 32)),))
    with pytest.raises(SqCpuError, match=r"keeps channel 32 of .*q_proj in float, which has 32"):
        sq_cpu.quantize(planted(), calibration, beyond, scheme=scheme)
    with pytest.raises(SqCpuError, match=r"keeps channel 32 of .*q_proj in float, which has 32"):
        sq_cpu.analyze(planted(), calibration, beyond, scheme=scheme)
    errors, naively = (
        {
            layer.name: layer.error
            for group in sq_cpu.analyze(planted(), calibration, made, scheme=scheme).groups
            for layer in group.linears
        }
        for made in (SmoothPlan((), layers), SmoothPlan(()))
    )
    for name, error in errors.items():
        assert error < 0.1 * naively[name] if name in outliers else error == naively[name]


def test_the_threshold_needs_a_calibration() -> None:
    with pytest.raises(SqCpuError, match="outlier_threshold need a calibration"):
        sq_cpu.quantize(planted(), scheme=LLM_INT8, smooth=False)


def test_float_columns_count_as_bytes() -> None:
    model = decomposed()
    layers = [m for m in model.modules() if isinstance(m, DecomposedLinear)]
    inner = [m for m in model.modules() if isinstance(m, QuantLinear)]
    parts = sum(m.nbytes - m.regular.nbytes for m in layers) + sum(m.nbytes for m in inner)
    head = model.lm_head.weight.nbytes
    assert linear_bytes(model, ignore=()) == parts + head


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_are_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = decomposed("opt", dtype)  # no rotary buffers, which tiny_model casts too
    folder = sq_cpu.save(model, tmp_path / "out")
    for loaded in (
        sq_cpu.load(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        sq_cpu.load(sq_cpu.save(sq_cpu.load(folder), tmp_path / "again")),
    ):
        assert_same_model(loaded, model, logits)
        assert loaded.sq_cpu_config == model.sq_cpu_config
    half = sq_cpu.load(folder, dtype=torch.float16).get_submodule("model.decoder.layers.0.fc1")
    assert half.outlier_weight.dtype == torch.float16
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 9
    assert "smoothed" not in settings


def test_a_decomposed_head_that_was_tied_is_loaded(tmp_path: Path) -> None:
    # T5 lists its head among the tied weights, whatever the config says.
    model, data = tiny_model("t5"), inputs("t5")
    assert "lm_head.weight" in model.all_tied_weights_keys
    scheme = Scheme(outlier_threshold=0.01, ignore=())
    found = sq_cpu.calibrate(model, data, ignore=())
    sq_cpu.quantize(model, found, scheme=scheme, smooth=False)
    assert isinstance(model.lm_head, DecomposedLinear)
    loaded = sq_cpu.load(sq_cpu.save(model, tmp_path / "out"))
    with torch.no_grad():
        assert_same_model(loaded, model, lambda model: model(**data[0]).logits)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = sq_cpu.save(decomposed(), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    good = (folder / "config.json").read_text()

    def fails(match: str, decomposed: Any) -> None:
        change_config(folder, lambda c: c["quantization_config"].update(decomposed=decomposed))
        with pytest.raises(SqCpuError, match=match) as caught:
            sq_cpu.load(folder)
        assert "\n" not in str(caught.value)
        (folder / "config.json").write_text(good)

    fails("decomposed is not a table", [name])
    fails("decomposed is not a table", {name: 0})
    fails("decomposed is not a table", {name: "2"})
    fails("decomposed names nowhere, which is not one of layers", {"nowhere": 2})
    table = json.loads(good)["quantization_config"]["decomposed"]
    fails(r"tensor .*up_proj\.columns is int64 \[2\], expected int64 \[3\]", table | {name: 3})
    fails(
        r"3 tensors .*up_proj\.columns.* not expected",
        {k: v for k, v in table.items() if k != name},
    )


def test_columns_that_do_not_fit_the_int8_part_are_refused(tmp_path: Path) -> None:
    model = decomposed()
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).columns[0] = 0
    folder = sq_cpu.save(model, tmp_path / "out")
    with pytest.raises(SqCpuError, match=rf"layer {name}: columns are not those that smoothing"):
        sq_cpu.load(folder)
