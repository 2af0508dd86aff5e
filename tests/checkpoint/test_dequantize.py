"""`model.dequantize()` of an int8 model: a plain float model of transformers again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sameness import assert_same_model
from tiny import inputs, mixed_plan, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding


def outputs(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs(name, 1)[0]).logits.float()
    return result


def quantized(name: str, scheme: Any = "O1", **config: Any) -> Any:
    model = tiny_model(name, **config)
    ignore = Scheme.of(scheme).ignore
    calibration = sq_cpu.calibrate(model, inputs(name), ignore=ignore, progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def near(found: Tensor, expected: Tensor, share: float) -> None:
    assert (found - expected).norm() <= share * expected.norm()


NAMES = ["llama", "gpt2", "falcon", "bloom", "opt", "mixtral", "bert", "t5", "gemma2"]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_float_model_again(name: str, tmp_path: Path) -> None:
    float_model, model = tiny_model(name), quantized(name)
    expected = outputs(model, name)
    assert model.dequantize() is model
    modules = list(zip(float_model.named_modules(), model.named_modules(), strict=True))
    assert [type(a) for (_, a), _ in modules] == [type(b) for _, (_, b) in modules]
    assert shapes(model) == shapes(float_model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Apart from the activations' rounding, what the int8 model gives, as near as that is to float.
    near(outputs(model, name), expected, 0.1)
    near(outputs(model, name), outputs(float_model, name), 0.1)
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "out")
    assert shapes(again) == shapes(float_model)
    assert torch.equal(outputs(again, name), outputs(model, name))


def test_weights_are_what_the_codes_stand_for() -> None:
    model = tiny_model("opt")
    calibration = sq_cpu.calibrate(model, inputs("opt"), progress=False)
    plan = mixed_plan(model, calibration, Scheme())
    sq_cpu.quantize(model, calibration, plan, progress=False)
    layers = dict(model.named_modules())
    assert {QuantLinear, DecomposedLinear} <= {type(layers[n]) for n in model.sq_cpu_config.layers}
    expected = {}
    for name in model.sq_cpu_config.layers:
        layer: Any = layers[name]
        inner = getattr(layer, "regular", layer)
        weight = inner.weight_int8().float() * inner.weight_scale[:, None]
        if inner.smoothing is not None:
            weight = weight / inner.smoothing
        if inner is not layer:
            weight[:, layer.columns] = layer.outlier_weight
        expected[name] = weight
    model.dequantize()
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@pytest.mark.parametrize("load", [sq_cpu.load, AutoModelForCausalLM.from_pretrained])
def test_of_a_loaded_model(load: Any, tmp_path: Path) -> None:
    model = quantized("llama", "O3", tie_word_embeddings=True)
    found = load(sq_cpu.save(model, tmp_path / "out")).dequantize()
    assert_same_model(found, model.dequantize())
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not hasattr(found, "sq_cpu_config")
    calibration = sq_cpu.calibrate(found, inputs("llama"), progress=False)
    sq_cpu.quantize(found, calibration, progress=False)  # as any other float model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_int8_head_with_a_tied_embedding(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=True)
    calibration = sq_cpu.calibrate(model, inputs(name), progress=False)
    sq_cpu.quantize(model, calibration, head="int8", progress=False)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    expected = outputs(model, name)
    float_model = tiny_model(name, tie_word_embeddings=True)
    model.dequantize()
    assert type(model.model.embed_tokens) is type(float_model.model.embed_tokens)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    near(outputs(model, name), expected, 0.1)


def test_dtype() -> None:
    model = quantized("llama").dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    mixed = quantized("t5", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in mixed.dequantize().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
def test_another_dtype_is_refused(dtype: Any) -> None:
    model = quantized("llama")
    with pytest.raises(SqCpuError, match=r"expected torch\.float32"):
        model.dequantize(dtype=dtype)
    assert model.sq_cpu_config  # as it was


def test_a_fused_model_is_refused() -> None:
    model = quantized("llama", "O3")
    sq_cpu.fuse(model)
    with pytest.raises(SqCpuError, match="is fused"):
        model.dequantize()


_STOCK = """
import sys
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
assert "sq_cpu" not in sys.modules
"""


def test_stock_transformers_reads_it(tmp_path: Path) -> None:
    quantized("llama", "O3").dequantize().save_pretrained(tmp_path / "out")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", _STOCK, tmp_path / "out"], env=environment, check=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_adapters_are_unloaded_first() -> None:
    model = quantized("llama")
    config = LoraConfig(target_modules=["q_proj"])
    adapted = get_peft_model(model, sq_cpu.with_int8_layers(config))
    before = shapes(model)
    with pytest.raises(SqCpuError, match=r"q_proj is a LoraQuantLinear, no int8 linear: unload"):
        model.dequantize()
    assert shapes(model) == before
    near(outputs(adapted.unload().dequantize(), "llama"), outputs(quantized("llama"), "llama"), 0.1)
