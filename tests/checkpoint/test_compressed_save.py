"""Models written in the format compressed-tensors: what they say, and what they cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer
from compressed_models import Net, edit_settings
from safetensors import safe_open
from tiny import batches, logits, tiny_model
from tiny_checkpoints import fails

import sq_cpu
from sq_cpu.checkpoint.compressed_save import check_recipe
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan

STATIC = Scheme.of("O3", dynamic_fallback=False)
SCHEMES = {
    "O1": Scheme.of("O1"),
    "O1 asymmetric": Scheme.of("O1", symmetric=False),
    "O3": STATIC,
    "O3 asymmetric": replace(STATIC, symmetric=False),
    "rows share scales": Scheme.of("O1", weights="per_rows", rows_per_scale=8),
}


def quantized(name: str = "llama", scheme: Scheme = STATIC, **options: Any) -> Any:
    model = tiny_model(name)
    calibration = sq_cpu.calibrate(model, batches(3), progress=False)
    options = {"hadamard": 0} | options
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False, **options)


def compressed(model: Any, folder: Path, **options: Any) -> Path:
    return sq_cpu.save(model, folder, format="compressed-tensors", **options)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    model = quantized(scheme=SCHEMES[name])
    folder = compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), max_shard_size=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    again: Any = sq_cpu.load(folder)
    assert torch.equal(logits(again), logits(model))
    for path in model.sq_cpu_config.layers:
        ours, read = model.get_submodule(path), again.get_submodule(path)
        assert torch.equal(ours.weight_int8(), read.weight_int8())
        assert torch.equal(ours.weight_scale, read.weight_scale)
        assert ours.static == read.static
    # In either format, from then on.
    assert torch.equal(logits(sq_cpu.load(sq_cpu.save(again, tmp_path / "ours"))), logits(model))
    assert torch.equal(logits(sq_cpu.load(compressed(again, tmp_path / "more"))), logits(model))


def test_bf16_keeps_its_scales(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16).eval()
    sq_cpu.quantize(model, smooth=False, progress=False)
    folder = compressed(model, tmp_path / "out")
    again = sq_cpu.load(folder)
    assert torch.equal(logits(again), logits(model))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        layer = "model.layers.0.self_attn.q_proj"
        kinds = {key: file.get_tensor(f"{layer}.{key}").dtype for key in ("weight_scale", "bias")}
    assert kinds == {"weight_scale": torch.float32, "bias": torch.bfloat16}


def test_what_the_config_says(tmp_path: Path) -> None:
    up, gate = (f"model.layers.0.mlp.{kind}_proj" for kind in ("up", "gate"))
    layers = [LayerPlan(name=name, activations="per_token") for name in (up, gate)]
    layers.append(LayerPlan(name="model.layers.1.mlp.down_proj", in_float=True))
    model = quantized(plan=SmoothPlan((), tuple(layers), STATIC), hadamard="auto")
    folder = compressed(model, tmp_path / "out")
    content = json.loads((folder / "config.json").read_text())
    found = content["quantization_config"]
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "int-quantized"
    assert found["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    by_kind = {g["input_activations"]["strategy"]: g for g in found["config_groups"].values()}
    assert sorted(by_kind["token"]["targets"]) == sorted([up, gate])
    assert by_kind["token"]["input_activations"]["dynamic"] is True
    assert len(by_kind["tensor"]["targets"]) == 11
    assert torch.equal(logits(sq_cpu.load(folder)), logits(model))
    # One kind of layers alone is all linears.
    folder = compressed(quantized(), tmp_path / "one")
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [g["targets"] for g in found["config_groups"].values()] == [["Linear"]]
    assert found["ignore"] == ["lm_head"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = {name for name in file.keys() if name.startswith(up)}  # noqa: SIM118  no dict
        tensors = {name: file.get_tensor(name) for name in names}
    shapes = {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        f"{up}.weight": (torch.int8, 48, 32),
        f"{up}.weight_scale": (torch.float32, 48, 1),
        f"{up}.input_scale": (torch.float32, 1),
        f"{up}.bias": (torch.float32, 48),
    }


def test_it_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    model = quantized()
    folder = compressed(model, tmp_path / "out", tokenizer=byte_tokenizer())
    compressed(model, folder, max_shard_size=20_000)
    assert not (folder / "tokenizer.json").exists()
    sq_cpu.save(model, folder)
    assert "sq_cpu_export" not in json.loads((folder / "config.json").read_text())
    compressed(model, folder)
    (folder / "notes.txt").write_text("mine")
    fails("notes.txt, which save did not write", compressed, model, folder)
    (folder / "notes.txt").unlink()
    again = sq_cpu.load(folder)
    sq_cpu.save(again, folder)
    sq_cpu.save(again, folder, byte_tokenizer())
    assert "sq_cpu_export" not in json.loads((folder / "config.json").read_text())
    compressed(again, folder)
    edit_settings(folder, lambda config: config.update(version="1.0"))  # as another tool has it
    fails("is not an sq_cpu checkpoint", compressed, model, folder)
    edit_settings(folder, lambda config: config.clear())
    fails("is not an sq_cpu checkpoint", compressed, model, folder)


PER_TOKEN_UP = LayerPlan(name="model.layers.0.mlp.up_proj", activations="per_token")
FLOAT_Q = LayerPlan(name="model.layers.1.self_attn.q_proj", in_float=True)
OUTLIERS = LayerPlan(name="model.layers.0.mlp.down_proj", outliers=(3,))
AT_RUN_TIME = GroupPlan(name="model.layers.0.mlp.up_proj", fold=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": Scheme.of("O2")}, 'one scale a call.*"O1" or "O3"'),
        ({"scheme": Scheme.of("O3")}, "scale of their own.*--no-dynamic-fallback"),
        ({"scheme": Scheme.of("O1", reduce_range=True)}, "7-bit activations.*reduce_range=False"),
        (
            {"scheme": Scheme.of("O1", outlier_threshold=0.5)},
            "channels in float beside int8 ones; quantize without outlier_threshold",
        ),
        ({"plan": SmoothPlan((), (OUTLIERS,))}, "channels in float beside int8 ones; plan no out"),
        ({"hadamard": 64}, "rotated at run time; quantize with hadamard=0"),
        ({"plan": SmoothPlan((AT_RUN_TIME,))}, "down_proj: .*smoothed at run time.*smooth=False"),
        ({"head": "int8"}, 'lm_head: .*head="float"'),
        (
            {"plan": SmoothPlan((), (PER_TOKEN_UP,))},
            "gate_proj has static symmetric inputs of scale .*up_proj per_token symmetric inputs",
        ),
        (
            {"plan": SmoothPlan((), (FLOAT_Q,))},
            "q_proj has inputs in float, .*k_proj static symmetric.*vLLM joins both",
        ),
    ],
)
def test_what_has_no_place_is_named(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    if "plan" in options:
        options |= {"hadamard": "auto"}
    model = quantized(**options)
    fails(match, compressed, model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (OUTLIERS, "down_proj: .*channels in float"),
        (
            LayerPlan(name="up_proj", smoothing=(2.0,)),
            "up_proj of the plan: .*smoothed at run time",
        ),
    ],
)
def test_a_plan_is_refused_before_the_work(layer: LayerPlan, match: str) -> None:
    fails(match, check_recipe, Recipe.of("O1", SmoothPlan((), (layer,))))


def test_a_prefix_has_no_place(tmp_path: Path) -> None:
    model = tiny_model("llama")
    windows = [torch.cat([torch.ones(2, 1, dtype=torch.int64), each], dim=1) for each in batches(2)]
    calibration = sq_cpu.calibrate(model, windows, prefix=[1], progress=False)
    sq_cpu.quantize(model, calibration, scheme=STATIC, hadamard=0, progress=False)
    fails("a prefix .*--prefix off", compressed, model, tmp_path / "out")


def test_static_inputs_that_differ_are_named(tmp_path: Path) -> None:
    model = quantized()
    layer = model.model.layers[1].self_attn.k_proj
    layer.load_state_dict(layer.state_dict() | {"input_scale": torch.tensor(0.25)})
    fails("q_proj has .*k_proj .*of scale 0.25.*plan them alike", compressed, model, tmp_path / "o")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_linears_that_are_not_their_own_are_named(tmp_path: Path, name: str) -> None:
    model = sq_cpu.quantize(tiny_model(name), smooth=False, progress=False)
    fails("is no linear of its own in transformers'", compressed, model, tmp_path / "out")


def test_models_of_others_and_other_formats(tmp_path: Path) -> None:
    model: Any = sq_cpu.quantize(Net(), smooth=False, progress=False)
    fails("Net is no class of transformers", compressed, model, tmp_path / "out")
    fails("format is 'gguf'; it is 'sq_cpu' or", sq_cpu.save, model, tmp_path, format="gguf")
    model = quantized().to(torch.bfloat16)
    fails("inv_freq is a buffer that transformers computes", compressed, model, tmp_path / "out")
