"""Models in the format compressed-tensors, read: golden values, and every way that it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer
from compressed_models import (
    INT4,
    INT8,
    STATIC,
    TOKEN,
    Net,
    edit_settings,
    edit_tensors,
    settings,
    write_net,
)
from tiny import batches, logits, tiny_model
from tiny_checkpoints import fails
from torch import Tensor

import sq_cpu
from sq_cpu.checkpoint import sources
from sq_cpu.checkpoint.compressed_load import compressed_config, open_compressed
from sq_cpu.checkpoint.load import load_floats
from sq_cpu.scheme import Scheme

Edit = Callable[[dict[str, Any]], object]

# What compressed-tensors 0.20 makes of four rows of eight.
CODES = torch.tensor([[-127, -60, 7, 64, 127, 1, 0, -1], [-128, -110, -94, 2, -60, -43, -26, -9]])
CODES = torch.cat([CODES, CODES.flip(1)]).to(torch.int8)
SCALES = torch.tensor([[0.015686275], [0.0037950666], [0.5], [1.0]])


def net(folder: Path, config: dict[str, Any], scheme: Any = None, **tensors: Tensor) -> Any:
    model: Any = sq_cpu.load(write_net(folder, config, **tensors), model=Net(), scheme=scheme)
    return model.linear


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_golden_int8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    given = {"weight": CODES, "weight_scale": SCALES.reshape(shape)}
    layer = net(tmp_path, settings(), **given, input_scale=torch.tensor([0.023529412]))
    assert torch.equal(layer.weight_int8(), CODES)
    assert torch.equal(layer.weight_scale, SCALES[:, 0])
    assert layer.static == (torch.tensor(0.023529412).item(), 128)
    # The range (-1, 3) of compressed-tensors: a scale of .015686275 with the point -64.
    given |= {"input_scale": torch.tensor([0.015686275])}
    given |= {"input_zero_point": torch.tensor([-64], dtype=torch.int8)}
    layer = net(tmp_path, settings(inputs=STATIC | {"symmetric": False}), **given)
    assert layer.static == (torch.tensor(0.015686275).item(), 64)
    assert not layer.scheme.dynamic_fallback


def test_static_inputs_take_all_codes_of_theirs(tmp_path: Path) -> None:
    step = torch.tensor([0.5])
    layer = net(tmp_path, settings(), weight=CODES, weight_scale=SCALES, input_scale=step)
    x = torch.tensor([[-1e3, -64.0, -63.75, 63.4, 63.9, 0.25, 0.75, -0.25]])
    codes = torch.clamp(torch.round(x / step), -128, 127)  # as compressed-tensors rounds
    expected = (codes.double() @ CODES.double().T).float() * (0.5 * SCALES[:, 0])
    assert torch.equal(layer(x), expected)


def test_scales_of_bf16_and_of_a_whole_tensor(tmp_path: Path) -> None:
    scale = torch.tensor([0.3], dtype=torch.bfloat16)
    config = settings(INT8 | {"strategy": "tensor"}, TOKEN)
    layer = net(tmp_path, config, weight=CODES, weight_scale=scale)
    assert layer.weight_scale.tolist() == [0.30078125] * 4
    assert layer.scheme == Scheme(weights="per_tensor", dynamic_fallback=False)


def packed(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)[:, None]


GROUPS = torch.tensor([[0.26666668, 0.098924734]]).repeat(4, 1)
SYMMETRIC = [-7, -4, -3, -3, -8, -7, -6, -6]
ASYMMETRIC = [-8, 0, 0, 1, -8, -7, -5, -4]
SHAPE = torch.tensor([4, 8])


def floats(folder: Path) -> Tensor:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with open_compressed(folder, compressed_config(folder, config), as_float=True) as stored:
        return stored.read("linear.weight")


def test_golden_packed(tmp_path: Path) -> None:
    config = settings(INT4, None, kind="pack-quantized")
    words = packed(*[0x22105541] * 4)
    write_net(tmp_path, config, weight_packed=words, weight_scale=GROUPS, weight_shape=SHAPE)
    expected = torch.tensor(SYMMETRIC).repeat(4, 1).float() * GROUPS.repeat_interleave(4, dim=1)
    assert torch.equal(floats(tmp_path), expected)


def test_golden_packed_asymmetric(tmp_path: Path) -> None:
    config = settings(INT4 | {"symmetric": False}, None, kind="pack-quantized")
    given = {"weight_packed": packed(*[0x43109880] * 4), "weight_shape": SHAPE}
    points = torch.tensor([[255, 255]], dtype=torch.int32)  # 7, 7, -8, -8 over the rows
    write_net(tmp_path, config, **given, weight_scale=GROUPS, weight_zero_point=points)
    codes = torch.tensor(ASYMMETRIC).repeat(4, 1) - torch.tensor([[7], [7], [-8], [-8]])
    assert torch.equal(floats(tmp_path), codes.float() * GROUPS.repeat_interleave(4, dim=1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_rows_of_one_scale_are_int8(tmp_path: Path, symmetric: bool) -> None:
    config = settings(INT4 | {"strategy": "channel", "group_size": None}, None)
    config = settings(
        INT4 | {"strategy": "channel", "group_size": None, "symmetric": symmetric},
        None,
        kind="pack-quantized",
    )
    given = {"weight_packed": packed(*[0x43109880] * 4), "weight_shape": SHAPE}
    if not symmetric:
        given["weight_zero_point"] = torch.tensor([[255]], dtype=torch.int32)
    given["weight_scale"] = SCALES
    layer = net(tmp_path, config, Scheme.of("O1", symmetric=False), **given)
    codes = torch.tensor(ASYMMETRIC).repeat(4, 1)
    if not symmetric:
        codes -= torch.tensor([[7], [7], [-8], [-8]])
    assert torch.equal(layer.weight_int8().long(), codes)
    assert layer.scheme.activations == "per_token"
    assert not layer.scheme.symmetric
    # One group that is a whole row is as good.
    edit_settings(tmp_path, lambda c: of_group(c)["weights"].update(strategy="group", group_size=8))
    model: Any = sq_cpu.load(tmp_path, model=Net(), scheme="O2")
    assert torch.equal(model.linear.weight_int8().long(), codes)


def test_asymmetric_weights_of_8_bits_are_floats(tmp_path: Path) -> None:
    config = settings(INT8 | {"symmetric": False}, TOKEN)
    given = {"weight": CODES, "weight_scale": SCALES}
    points = torch.tensor([[0], [1], [-1], [0]], dtype=torch.int8)
    more = {"weight_zero_point": points}
    fails("less their zero point leave int8", net, tmp_path, config, **given, **more)
    assert not sources.is_checkpoint(tmp_path)
    assert torch.equal(floats(tmp_path), (CODES.float() - points) * SCALES)
    given["weight"] = CODES.clamp(-100, 100)
    layer = net(tmp_path, config, **given, weight_zero_point=points)
    assert torch.equal(layer.weight_int8(), given["weight"] - points)


def of_group(config: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = config["config_groups"]["group_0"]
    return group


def test_a_scheme_is_for_inputs_in_float_alone(tmp_path: Path) -> None:
    given = {"weight": CODES, "weight_scale": SCALES}
    folder = write_net(tmp_path, settings(inputs=None), **given)
    fails('scheme="O1"', sq_cpu.load, folder, model=Net())
    fails("need a calibration", sq_cpu.load, folder, model=Net(), scheme="O3")
    fails("unknown scheme", sq_cpu.load, folder, model=Net(), scheme="O9")
    write_net(tmp_path, settings(inputs=TOKEN), **given)
    fails("quantized already; leave out", sq_cpu.load, folder, model=Net(), scheme="O1")
    fails("linear.input_scale is missing", net, tmp_path, settings(), **given)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA, static W8A8, with a tokenizer."""
    model = tiny_model("llama", vocab_size=384)
    scheme = Scheme.of("O3", dynamic_fallback=False, symmetric=False)
    calibration = sq_cpu.calibrate(model, batches(2), progress=False)
    sq_cpu.quantize(model, calibration, scheme=scheme, hadamard=0, progress=False)
    folder = tmp_path_factory.mktemp("compressed") / "out"
    return sq_cpu.save(model, folder, byte_tokenizer(), format="compressed-tensors")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "out"))


def test_the_template_is_read(folder: Path) -> None:
    model: Any = sq_cpu.load(folder)
    assert logits(model).isfinite().all()
    assert len(model.sq_cpu_config.layers) == 14
    loaded, _ = sources.load_source(folder)
    assert torch.equal(logits(loaded), logits(model))


def test_it_runs_fused(folder: Path) -> None:
    model: Any = sq_cpu.load(folder)
    expected = logits(model)
    sq_cpu.fuse(model, kv="bf16")
    # Keys and values in bf16 alone are rounded otherwise, to 2^-9.
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()
    assert sources.is_checkpoint(folder)  # what sq-cpu serve asks
    assert len(sq_cpu.generate(model, [[3, 4]], max_new_tokens=3)[0]) <= 3


LAYER = "model.layers.0.mlp.up_proj"


def group(**entries: Any) -> Edit:
    return lambda config: of_group(config).update(entries)


def weights(**entries: Any) -> Edit:
    return lambda config: of_group(config)["weights"].update(entries)


def inputs(**entries: Any) -> Edit:
    return lambda config: of_group(config)["input_activations"].update(entries)


def top(**entries: Any) -> Edit:
    return lambda config: config.update(entries)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (top(kv_cache_scheme=INT8), "kv_cache_scheme.*sq_cpu.fuse"),
        (top(sparsity_config={"format": "sparse-24-bitmask"}), "sparse .sparsity_config"),
        (top(sparsity_config=["2:4"]), "sparse .sparsity_config"),
        (top(transform_config={"config_groups": {"u": {}}}), "rotated .transform_config"),
        (group(format="dense"), "format is 'dense'"),
        (top(config_groups={}), "config_groups is no table"),
        (top(config_groups=[1]), "config_groups is no table"),
        (top(config_groups={"W8A8": ["Linear"]}), "group W8A8: it is the name of a preset"),
        (top(config_groups={"g": 3}), "group g: the group is 3, not a table"),
        (group(format="float-quantized"), "its format is 'float-quantized'; sq_cpu reads int-q"),
        (group(format="marlin-24"), "its format is 'marlin-24'"),
        (group(format=None, surprise=1), "unknown field 'surprise'"),
        (group(weights=None), "its weights are not quantized"),
        (group(output_activations=INT8), "outputs are quantized"),
        (group(targets="Linear"), "targets is 'Linear', not a list"),
        (weights(type="float"), "weights of 8 bits of type 'float'"),
        (weights(num_bits=3), "weights of 3 bits"),
        (weights(strategy="block", block_structure=[128, 128]), "strategy of its weights is 'blo"),
        (weights(strategy="astral"), "strategy of its weights is 'astral'"),
        (weights(dynamic=True), "strategy of its weights is 'channel'"),
        (weights(strategy="group"), "group_size is 0"),
        (weights(actorder="group"), "actorder='weight'"),
        (weights(num_bits="8"), "num_bits is '8', not an integer"),
        (weights(colour="red"), "unknown field 'colour'"),
        (inputs(num_bits=4), "inputs of 4 bits"),
        (inputs(type="float"), "inputs of 8 bits of type 'float'"),
        (inputs(strategy="group", group_size=8), "by the static strategy 'group'"),
        (inputs(strategy="token"), "by the static strategy 'token'"),
        (inputs(dynamic="local"), "by the dynamic strategy 'tensor'"),
        (
            inputs(strategy="token", dynamic=True),
            "input_scale is there, but the inputs",
        ),
        (inputs(symmetric=True), "input_zero_point is not 0"),
        (weights(strategy="tensor"), "weight_scale is float32 .*not floats"),
        (weights(symmetric=False), "weight_zero_point is missing; get the whole model"),
        (group(format="pack-quantized"), "weight_packed is missing, which the format pack"),
        (weights(strategy="group", group_size=16), "weight_scale is float32"),
    ],
)
def test_a_config_that_is_not_read(folder: Path, edit: Edit, match: str) -> None:
    edit_settings(folder, edit)
    fails(match, sq_cpu.load, folder)


def put(name: str, value: Callable[[Tensor], Tensor] | Tensor | None) -> Callable[..., object]:
    """Return what replaces, adds or removes a tensor of `LAYER`."""

    def change(tensors: dict[str, Tensor]) -> None:
        before = tensors.pop(f"{LAYER}.{name}", None)
        if isinstance(value, Tensor):
            tensors[f"{LAYER}.{name}"] = value
        elif value is not None:
            assert before is not None
            tensors[f"{LAYER}.{name}"] = value(before).contiguous()

    return change


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (put("weight_scale", None), f"{LAYER}.weight_scale is missing; get the whole model"),
        (put("input_scale", None), "input_scale is missing"),
        (put("input_zero_point", None), "input_zero_point is missing"),
        (put("weight", None), "_scale has no integers that it scales"),
        (put("weight", lambda t: t[0]), r"weight is int8 \[32\], not a matrix of int8"),
        (put("weight", lambda t: t[:, :-1]), f"tensor {LAYER}.weight is int8 .*expected int8"),
        (put("weight", lambda t: t.float()), "no integers that it scales"),
        (put("weight", lambda t: t[:-1]), "weight_scale is float32"),
        (put("weight_scale", lambda t: t.T), "weight_scale is float32"),
        (put("weight_scale", lambda t: t.int()), "weight_scale is int32"),
        (put("weight_scale", lambda t: t * torch.nan), "weight_scale has NaN or Inf"),
        (put("input_scale", lambda t: -t), "static input scale"),
        (put("input_scale", lambda t: t.repeat(2)), r"input_scale is float32 \[2\]"),
        (put("input_zero_point", torch.tensor([300])), "zero point 428 is not of this"),
        (put("bias", lambda t: t[:-1]), "bias is float32"),
        (put("weight_g_idx", torch.zeros(32, dtype=torch.int32)), "actorder='weight'"),
        (put("astral", torch.zeros(1)), "astral not expected by LlamaForCausalLM; get the whole"),
        (put("weight_zero_point", torch.ones(48, 1).char()), "weight_zero_point is not 0"),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}), "no integers"),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight missing; get the whole"),
        (
            lambda t: t.update(
                {f"x.experts.0.{k}": t[f"{LAYER}.{k}"].clone() for k in ("weight", "weight_scale")}
            ),
            "expert of a mixture",
        ),
        (
            lambda t: t.update(
                {f"x.{k}": t[f"{LAYER}.{k}"].clone() for k in ("weight", "weight_scale")}
                | {f"x.{k}": t[f"{LAYER}.{k}"].clone() for k in ("input_scale", "input_zero_point")}
            ),
            "layer x is not a linear of LlamaForCausalLM",
        ),
    ],
)
def test_tensors_that_are_not_read(folder: Path, edit: Callable[..., object], match: str) -> None:
    edit_tensors(folder, edit)
    fails(match, sq_cpu.load, folder)


def test_what_early_versions_wrote(folder: Path) -> None:
    before = logits(sq_cpu.load(folder))
    edit_settings(folder, lambda config: config.update(quantization_status="frozen"))
    edit_settings(folder, group(format=None))
    edit_tensors(folder, put("weight_zero_point", torch.zeros(48, 1, dtype=torch.int8)))
    assert torch.equal(logits(sq_cpu.load(folder)), before)


def test_no_files_and_no_layers(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    fails("has no model.safetensors and no", sq_cpu.load, folder)
    tiny_model("llama").save_pretrained(folder / "float")
    shutil.copy(folder / "float" / "model.safetensors", folder)
    fails("no tensors of quantized linears", sq_cpu.load, folder)


def test_groups_are_found_by_name_expression_and_class(folder: Path) -> None:
    def split(config: dict[str, Any]) -> None:
        usual = of_group(config)
        per_token = usual | {"input_activations": TOKEN | {"symmetric": False}}
        config["config_groups"] = {
            "a": usual | {"targets": ["Linear"]},
            "b": per_token | {"targets": ["re:.*layers[.]1[.]self_attn.*", LAYER]},
        }

    dynamic = [LAYER, *(f"model.layers.1.self_attn.{k}_proj" for k in "qkvo")]
    edit_settings(folder, split)
    edit_tensors(
        folder,
        lambda tensors: [
            tensors.pop(f"{name}.{key}")
            for name in dynamic
            for key in ("input_scale", "input_zero_point")
        ],
    )
    model: Any = sq_cpu.load(folder)
    record = model.sq_cpu_config
    kinds = {name: record.layer_scheme(name).activations for name in record.layers}
    assert sorted(n for n, kind in kinds.items() if kind == "per_token") == sorted(dynamic)
    assert torch.equal(logits(sq_cpu.load(sq_cpu.save(model, folder / "ours"))), logits(model))

    def target(text: str) -> Edit:
        return lambda config: config["config_groups"]["b"].update(targets=[text])

    edit_settings(folder, target("re:" + ".*a" * 9))
    fails("repeats too much to be tried", sq_cpu.load, folder)
    edit_settings(folder, target("re:(a+)+$"))
    fails("repeats too much to be tried", sq_cpu.load, folder)
    edit_settings(folder, target("re:[a"))
    fails("is no regular expression", sq_cpu.load, folder)
    edit_settings(folder, lambda config: config["config_groups"]["a"].update(targets=["Conv1d"]))
    edit_settings(folder, target(LAYER))
    fails("no config group has it as a target", sq_cpu.load, folder)


def test_symmetric_and_asymmetric_inputs_of_one_model(folder: Path) -> None:
    def split(config: dict[str, Any]) -> None:
        usual = of_group(config)
        config["config_groups"]["group_1"] = usual | {"targets": [LAYER]}
        config["config_groups"]["group_1"]["input_activations"] = TOKEN

    edit_settings(folder, split)
    edit_tensors(
        folder, lambda t: (t.pop(f"{LAYER}.input_scale"), t.pop(f"{LAYER}.input_zero_point"))
    )
    fails("which one Scheme cannot say", sq_cpu.load, folder)
    edit_settings(folder, inputs(symmetric=True))
    edit_tensors(
        folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("input_zero_point")]
    )
    model: Any = sq_cpu.load(folder)
    assert model.sq_cpu_config.scheme.symmetric
    assert {m.static[1] for m in model.modules() if getattr(m, "static", None)} == {128}


def test_weights_alone_become_floats(folder: Path) -> None:
    expected: Any = sq_cpu.load(folder)
    edit_settings(folder, group(input_activations=None))
    edit_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "proj.input_" in n])
    said: list[str] = []
    model, _ = sources.load_source(folder, say=said.append)
    assert said == [f"loading {folder}, its weights made floats, its inputs in float"]
    assert not hasattr(model, "sq_cpu_config")
    for name in expected.sq_cpu_config.layers:
        want = expected.get_submodule(name).weight_float()
        assert torch.equal(model.get_submodule(name).weight, want), name
    assert load_floats(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    calibration = sq_cpu.calibrate(model, batches(2), progress=False)
    sq_cpu.quantize(model, calibration, scheme="O3", progress=False)


def test_others_are_named(folder: Path) -> None:
    edit_settings(folder, lambda config: config.update(quant_method="gptq"))
    fails("expected 'sq_cpu' or 'compressed-tensors'", sq_cpu.load, folder)
    fails("already quantized .gptq.", sources.load_source, folder)
    saved = sq_cpu.save(sq_cpu.quantize(tiny_model("llama"), smooth=False), folder / "ours")
    fails("says the scheme of this checkpoint", sq_cpu.load, saved, scheme="O1")
    fails("quantized already; give the float", load_floats, saved)
