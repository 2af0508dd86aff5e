"""An int8 head and the embeddings that read its weight, saved once and loaded as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batches, change_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.nn.embedding import QuantEmbedding

LOADER = """
import sys, torch
from safetensors.torch import load_file, save_file
import sq_cpu
with torch.no_grad():
    logits = sq_cpu.load(sys.argv[1])(load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits}, sys.argv[3])
"""


def made(model_type: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(model_type, tie_word_embeddings=tied).to(dtype)
    calibration = sq_cpu.calibrate(model, batches())
    return sq_cpu.quantize(model, calibration, scheme="O3", head="int8")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batches()[0]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt", "gpt2", "bloom"])
def test_what_is_loaded_is_what_was_saved(
    model_type: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(model_type, tied=tied, dtype=dtype)
    expected = logits(model)
    folder = sq_cpu.save(model, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.int8
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    assert (f"{name}.weight" in stored) == (not tied)
    for load in (sq_cpu.load, AutoModelForCausalLM.from_pretrained):
        loaded: Any = load(folder)
        assert torch.equal(logits(loaded), expected)
        assert loaded.sq_cpu_config == model.sq_cpu_config
        embedding = loaded.get_input_embeddings()
        assert isinstance(embedding, QuantEmbedding) == tied
        assert embedding.weight.dtype == dtype
    again = sq_cpu.save(sq_cpu.load(folder), tmp_path / "again")
    assert torch.equal(logits(sq_cpu.load(again)), expected)


def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    model = made("gemma3_text")
    folder = sq_cpu.save(model, tmp_path / "out")
    save_file({"ids": batches()[0]}, tmp_path / "ids")
    command = [sys.executable, "-c", LOADER, folder, tmp_path / "ids", tmp_path / "logits"]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(model))


def test_another_dtype_is_that_of_the_lookup_too(tmp_path: Path) -> None:
    folder = sq_cpu.save(made("llama"), tmp_path / "out")
    loaded = sq_cpu.load(folder, dtype=torch.bfloat16)
    assert loaded.get_input_embeddings().dtype == torch.bfloat16
    assert logits(loaded).dtype == torch.bfloat16


def test_a_model_whose_embedding_was_replaced_is_not_saved(tmp_path: Path) -> None:
    model = made("llama")
    model.model.embed_tokens = nn.Embedding(64, 32)
    with pytest.raises(SqCpuError, match=r"model\.embed_tokens was to read the weight of lm_head"):
        sq_cpu.save(model, tmp_path / "out")
    other = made("llama", tied=False)
    other.model.embed_tokens = QuantEmbedding(other.lm_head, other.model.embed_tokens)
    with pytest.raises(SqCpuError, match="not in the model's record"):
        sq_cpu.save(other, tmp_path / "out")


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([], "embeddings is not a table of modules and layers"),
        ({"model.embed_tokens": "model.nothing"}, "embeddings is not a table"),
        ({"model.norm": "lm_head"}, r"model\.norm, which is to read .* lm_head, is no embedding"),
        ({"model.nothing": "lm_head"}, r"model\.nothing, which is to read .*, is no embedding"),
        ({}, r"model\.embed_tokens\.weight missing"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    embeddings: object, message: str, tmp_path: Path
) -> None:
    folder = sq_cpu.save(made("llama"), tmp_path / "out")
    change_config(folder, lambda c: c["quantization_config"].update(embeddings=embeddings))
    with pytest.raises(SqCpuError, match=message) as caught:
        sq_cpu.load(folder)
    assert "\n" not in str(caught.value)
