"""Recipes that IPEX and Neural Compressor wrote.

tests/data/qconf has those of IPEX 2.8.0, for `model`, calibrated on `data`: ipex-shared.json with
one smoothing scale for linears that share an input, ipex-own.json with one for each.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.smoothing.qconf import plan_from_qconf

FOLDER = Path(__file__).parents[1] / "data" / "qconf"
KINDS = ("shared", "own")
DIALECTS = ("ipex", "inc")
BLOCK = "model.layers.0"
IN_PASS = {
    "shared": {f"{BLOCK}.self_attn.o_proj", "lm_head"},
    "own": {
        *(f"{BLOCK}.self_attn.{name}_proj" for name in "qkvo"),
        *(f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up")),
        "lm_head",
    },
}
"""o_proj has another factor for each query head that reads the same value head."""


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def data() -> list[torch.Tensor]:
    ids = torch.arange(32).reshape(1, 32)
    return [(ids * (index + 3) + index) % 32 for index in range(3)]


def recipe(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"ipex-{kind}.json").read_text())  # type: ignore[no-any-return]


def linears(content: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return every linear's operator, with its index in its module."""
    return {
        operator["fqn"]: (index, operator)
        for module in content.values()
        for index, operator in module["q_op_infos"].items()
        if "linear.Linear" in operator["op_type"]
    }


def as_inc(content: dict[str, Any]) -> dict[str, Any]:
    """Return what Neural Compressor writes: lists in the place of tables."""
    content = copy.deepcopy(content)
    for index, operator in linears(content).values():
        (info,) = operator["input_tensor_infos"]
        for name in ("scale", "zero_point", "smooth_quant_scaling_factor"):
            info[name] = info[name].get(f"{index}_0", next(iter(info[name].values())))
    return content


def write(folder: Path, content: Any) -> Path:
    path = folder / "best_configure.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_the_scales_of_the_recipe(kind: str, dialect: str, tmp_path: Path) -> None:
    content = recipe(kind)
    path = write(tmp_path, content if dialect == "ipex" else as_inc(content))
    original = model()
    with torch.no_grad():
        wanted = original(data()[0]).logits
    weights = {name: p.detach().clone() for name, p in original.named_parameters()}
    plan = plan_from_qconf(path, original)
    assert sq_cpu.SmoothPlan.from_json(plan.to_json()) == plan
    assert all(torch.equal(p, weights[name]) for name, p in original.named_parameters())
    calibration = sq_cpu.calibrate(original, data(), ignore=())
    quantized: Any = sq_cpu.quantize(original, calibration, plan)
    assert set(quantized.sq_cpu_config.smoothed) == IN_PASS[kind]
    found = linears(content)
    assert len(found) == 8
    for name, (index, operator) in found.items():
        (info,), (of_weight,) = operator["input_tensor_infos"], operator["weight_tensor_infos"]
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        own = f"{index}_0" if f"{index}_0" in info["scale"] else "0_0"
        assert layer.input_scale == pytest.approx(info["scale"][own][0], rel=1e-6)
        assert layer.input_zero_point == info["zero_point"][own][0]
        s = 1 / torch.tensor(info["smooth_quant_scaling_factor"][own])
        if name in IN_PASS[kind]:
            torch.testing.assert_close(layer.smoothing, s)
        else:
            assert layer.smoothing is None
        # IPEX's symmetric weights have 255 codes on absmax / 127.5.
        scales = torch.tensor(of_weight["scale"]) * 127.5 / 127
        if name.endswith("up_proj"):  # whose outputs are divided by s of the down projection
            _, after = found[f"{BLOCK}.mlp.down_proj"]
            (factors,) = after["input_tensor_infos"][0]["smooth_quant_scaling_factor"].values()
            scales *= torch.tensor(factors)
        torch.testing.assert_close(layer.weight_scale, scales, rtol=1e-4, atol=0)
    with torch.no_grad():
        error = (quantized(data()[0]).logits - wanted).norm() / wanted.norm()
    assert error < 0.02
    out = sq_cpu.save(quantized, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(sq_cpu.load(out)(data()[0]).logits, quantized(data()[0]).logits)


def test_both_dialects_are_one_plan(tmp_path: Path) -> None:
    for kind in KINDS:
        given = plan_from_qconf(FOLDER / f"ipex-{kind}.json", model())
        assert plan_from_qconf(write(tmp_path, as_inc(recipe(kind))), model()) == given


def test_what_the_recipe_leaves_in_float_stays_so(tmp_path: Path) -> None:
    content = recipe("shared")
    down, gate = f"{BLOCK}.mlp.down_proj", f"{BLOCK}.mlp.gate_proj"
    for index, operator in linears(content).values():
        if operator["fqn"] == down:
            operator["input_tensor_infos"][0]["inf_dtype"] = "torch.float32"
        if operator["fqn"] == gate:
            del content["model:layers:0:mlp"]["q_op_infos"][index]
    original = model()
    plan = plan_from_qconf(write(tmp_path, content), original)
    assert plan.in_float.keys() == {down, gate}
    quantized: Any = sq_cpu.quantize(original, sq_cpu.calibrate(original, data(), ignore=()), plan)
    assert quantized.sq_cpu_config.kept.keys() == {down, gate}
    assert isinstance(quantized.get_submodule(gate), torch.nn.Linear)


def test_signed_inputs_have_the_same_codes(tmp_path: Path) -> None:
    content = recipe("shared")
    for _, operator in linears(content).values():
        (info,) = operator["input_tensor_infos"]
        info["inf_dtype"] = "torch.qint8"
        for key in info["zero_point"]:
            info["zero_point"][key] = [info["zero_point"][key][0] - 128]
    given = plan_from_qconf(FOLDER / "ipex-shared.json", model())
    assert plan_from_qconf(write(tmp_path, content), model()) == given


def test_the_analysis_is_of_the_recipe() -> None:
    original = model()
    plan = plan_from_qconf(FOLDER / "ipex-own.json", original)
    calibration = sq_cpu.calibrate(original, data(), ignore=())
    analysis = sq_cpu.analyze(original, calibration, plan)
    linears = {linear.name: linear for group in analysis.groups for linear in group.linears}
    assert len(linears) == 8
    assert all(0 < linear.error < 1e-3 for linear in linears.values())
    # With s = 1 in the place of its own, its range would not fit.
    layers = [
        layer
        if layer.name != "lm_head"
        else sq_cpu.LayerPlan(name="lm_head", smoothing=(1.0,) * 16)
        for layer in plan.layers
    ]
    other = sq_cpu.SmoothPlan((), tuple(layers), plan.scheme)
    changed = sq_cpu.analyze(original, calibration, other)
    errors = {linear.name: linear.error for group in changed.groups for linear in group.linears}
    assert errors["lm_head"] != linears["lm_head"].error


def test_twice_smoothed_is_refused() -> None:
    original = model()
    plan = plan_from_qconf(FOLDER / "ipex-shared.json", original)
    layers = tuple(
        sq_cpu.LayerPlan(name=layer.name, smoothing=(1.0,) * 16)
        if layer.name == "lm_head"
        else layer
        for layer in plan.layers
    )
    calibration = sq_cpu.calibrate(original, data(), ignore=())
    both = sq_cpu.SmoothPlan(plan.groups, layers, plan.scheme)
    with pytest.raises(SqCpuError, match=r"smooths lm_head with group lm_head.input and by itself"):
        sq_cpu.quantize(original, calibration, both)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return a recipe of which the q projection is changed."""
    content = recipe("shared")
    change(linears(content)[f"{BLOCK}.self_attn.q_proj"][1])
    return content


def of_input(**values: Any) -> dict[str, Any]:
    return changed(lambda operator: operator["input_tensor_infos"][0].update(values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"is \[\], not a table"),
        ({"a": 1}, "a is 1, not a table"),
        ({}, "quantizes no linear: it is to be what IPEX"),
        ({"groups": []}, r"groups is \[\], not a table"),
        ({" ": {"q_op_infos": {}}}, "quantizes no linear"),
        (changed(lambda o: o.pop("fqn")), "operator 0: fqn is None, not a text"),
        (changed(lambda o: o.update(fqn="nowhere")), "has nowhere, which is no linear"),
        (changed(lambda o: o.update(fqn="lm_head")), "quantizes lm_head in two ways"),
        (changed(lambda o: o.update(input_tensor_infos=[])), "input_tensor_infos has 0 entries"),
        (of_input(inf_dtype="torch.bfloat16"), "inf_dtype is 'torch.bfloat16', not one of"),
        (of_input(scale=[]), "has 0 input scales, not one: only recipes of static"),
        (of_input(scale=None), "has 0 input scales, not one"),
        (of_input(scale=[-1.0]), "input_range is"),
        (of_input(scale={"1_0": [1.0], "2_0": [1.0]}), "scale has no entry 0_0; the recipe is dam"),
        (of_input(zero_point=[256]), "zero point 256 is no code of torch.quint8"),
        (of_input(zero_point=[-1]), "zero point -1 is no code of torch.quint8"),
        (of_input(scale=["x"]), "scale is 'x', not a finite number"),
        (of_input(scale=[float("nan")]), "scale is nan, not a finite number"),
        (of_input(smooth_quant_scaling_factor=[1.0] * 16), "no reciprocals of each other"),
        (of_input(smooth_quant_scaling_factor=[]), "no reciprocals of each other"),
        (
            changed(
                lambda o: [
                    o["input_tensor_infos"][0].update(smooth_quant_scaling_factor=[0.5] * 15),
                    o["weight_tensor_infos"][0].update(smooth_quant_scaling_factor=[2.0] * 15),
                ]
            ),
            "has 15 smoothing factors for .*q_proj, which has 16 input channels",
        ),
        (
            changed(
                lambda o: [
                    o["input_tensor_infos"][0].update(smooth_quant_scaling_factor=[-0.5] * 16),
                    o["weight_tensor_infos"][0].update(smooth_quant_scaling_factor=[-2.0] * 16),
                ]
            ),
            "a smoothing factor is not positive",
        ),
    ],
)
def test_what_is_no_recipe_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=message) as caught:
        plan_from_qconf(write(tmp_path, content), model())
    assert "\n" not in str(caught.value)


def test_other_models_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=r"best_configure.json has .*, which is no linear of the"):
        plan_from_qconf(write(tmp_path, recipe("shared")), tiny_model("opt"))
    with pytest.raises(SqCpuError, match="cannot be read as JSON"):
        plan_from_qconf(tmp_path / "nowhere.json", model())
