"""An int8 checkpoint read into other classes of its model: the base alone, or another head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sameness import assert_same_model, assert_to_rounding
from tiny import batches, tiny_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    T5EncoderModel,
)

import sq_cpu
from sq_cpu import QuantLinear, Scheme, SqCpuError


def quantized(model: Any, scheme: Any = "O3", **options: Any) -> Any:
    calibration = sq_cpu.calibrate(
        model, batches(), ignore=Scheme.of(scheme).ignore, progress=False
    )
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False, **options)


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(batches(1)[0]).last_hidden_state
    return result


def int8(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert", "mixtral", "gemma2"])
def test_base_of_a_model_with_a_head(name: str, tmp_path: Path) -> None:
    model = quantized(tiny_model(name))
    folder = sq_cpu.save(model, tmp_path / "out")
    found, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert found.base_model is found
    prefix = f"{model.base_model_prefix}."
    layers = [layer for layer in model.sq_cpu_config.layers if layer.startswith(prefix)]
    assert [prefix + layer for layer in found.sq_cpu_config.layers] == layers
    assert int8(found) == set(found.sq_cpu_config.layers) != set()
    assert {prefix + group.name for group in found.sq_cpu_config.plan.groups} <= {
        group.name for group in model.sq_cpu_config.plan.groups
    }
    assert "lm_head" not in found.sq_cpu_config.kept
    if name != "bert":  # whose base has a pooler
        assert not report["missing_keys"]
    assert_to_rounding(hidden(found), hidden(model.base_model), model.dtype)
    # And again to disk, as any other.
    again = sq_cpu.save(found, tmp_path / "base")
    assert_same_model(sq_cpu.load(again), found, hidden)
    assert_same_model(AutoModel.from_pretrained(again), found, hidden)


def test_other_head_is_new_and_reported(tmp_path: Path) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=False))
    folder = sq_cpu.save(model, tmp_path / "out")
    found, report = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert type(found).__name__ == "LlamaForSequenceClassification"
    assert report["missing_keys"] == {"score.weight"}
    assert report["unexpected_keys"] == {"lm_head.weight"}
    weight = found.score.weight
    assert weight.shape == (3, 32)
    assert 0 < weight.std() < 0.1  # initialised, as config.initializer_range says
    assert found.sq_cpu_config.layers == model.sq_cpu_config.layers
    assert_to_rounding(hidden(found.model), hidden(model.model), model.dtype)
    with torch.no_grad():
        found.score.weight.normal_()
        expected = found(batches(1)[0]).logits
    again = AutoModelForSequenceClassification.from_pretrained(
        sq_cpu.save(found, tmp_path / "again")
    )
    with torch.no_grad():
        assert_to_rounding(again(batches(1)[0]).logits, expected, torch.float32)
    assert torch.equal(again.score.weight, found.score.weight)


def test_head_in_the_dtype_of_the_call(tmp_path: Path) -> None:
    folder = sq_cpu.save(quantized(tiny_model("bert")), tmp_path / "out")
    found = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert found(batches(1)[0]).logits.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_base_into_a_model_with_a_head(tied: bool, tmp_path: Path) -> None:
    base = quantized(tiny_model("llama", tie_word_embeddings=tied).model)
    folder = sq_cpu.save(base, tmp_path / "out")
    found, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == (set() if tied else {"lm_head.weight"})
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert [f"model.{layer}" for layer in base.sq_cpu_config.layers] == list(
        found.sq_cpu_config.layers
    )
    assert_to_rounding(hidden(found.model), hidden(base), base.dtype)
    with torch.no_grad():
        assert found(batches(1)[0]).logits.isfinite().all()


def test_encoder_of_a_t5(tmp_path: Path) -> None:
    model = tiny_model("t5")
    sq_cpu.quantize(model, scheme="O1", smooth=False, progress=False)
    found = T5EncoderModel.from_pretrained(sq_cpu.save(model, tmp_path / "out"))
    assert int8(found)
    assert all(name.startswith("encoder.") for name in int8(found))
    assert_to_rounding(hidden(found), hidden(model.encoder), model.dtype)


def test_int8_head_is_left_out(tmp_path: Path) -> None:
    model = quantized(tiny_model("llama"), Scheme(ignore=()))
    assert "lm_head" in model.sq_cpu_config.layers
    found = AutoModel.from_pretrained(sq_cpu.save(model, tmp_path / "out"))
    assert_to_rounding(hidden(found), hidden(model.model), model.dtype)


def test_embedding_that_needs_the_int8_head(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model = quantized(model, "O1", head="int8")
    folder = sq_cpu.save(model, tmp_path / "out")
    with pytest.raises(SqCpuError, match="load the class that was saved"):
        AutoModel.from_pretrained(folder)


def test_a_class_of_another_model(tmp_path: Path) -> None:
    folder = sq_cpu.save(quantized(tiny_model("llama")), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OPTForCausalLM"]}))
    with pytest.raises(SqCpuError, match="holds a OPTForCausalLM, not a LlamaForCausalLM"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_what_the_base_needs_is_not_new(tmp_path: Path) -> None:
    folder = sq_cpu.save(quantized(tiny_model("llama")), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SqCpuError, match=r"tensors \(model.layers.2.*missing"):
        AutoModelForSequenceClassification.from_pretrained(folder)
