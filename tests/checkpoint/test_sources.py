"""Loading models from folders, checkpoints, GGUF files and the hub, and every way it fails."""

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from byte_models import byte_model, byte_tokenizer, save_float
from safetensors.torch import load_file, save_file
from sameness import assert_same_model
from tiny import batches

import sq_cpu
from sq_cpu.checkpoint import sources
from sq_cpu.checkpoint.save import save
from sq_cpu.errors import first_line


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def error_of(source: Any) -> str:
    with pytest.raises(sq_cpu.SqCpuError) as caught:
        sources.load_source(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder(tmp_path: Path) -> None:
    expected = byte_model()
    model, tokenizer = sources.load_source(save_float(tmp_path))
    ids = batches(1)[0]
    assert_same_model(model, expected, lambda model: model(ids).logits)
    assert not model.training
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (None, torch.bfloat16)],
)
def test_dtype(tmp_path: Path, asked: torch.dtype | None, expected: torch.dtype) -> None:
    model, _ = sources.load_source(save_float(tmp_path, dtype=torch.bfloat16), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_checkpoint(tmp_path: Path) -> None:
    model = sq_cpu.quantize(byte_model(), smooth=False)
    save(model, tmp_path / "out", byte_tokenizer())
    loaded, tokenizer = sources.load_source(str(tmp_path / "out"))
    ids = batches(1)[0]
    assert_same_model(loaded, model, lambda model: model(ids).logits)
    assert tokenizer.decode([3]) == byte_tokenizer().decode([3])


def test_stderr_is_dropped_for_a_caller_with_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_float(tmp_path)
    load_tokenizer = sources.load_tokenizer

    def chatty(*args: Any, **options: Any) -> Any:
        print("chatter", file=sys.stderr)
        return load_tokenizer(*args, **options)

    monkeypatch.setattr(sources, "load_tokenizer", chatty)
    said: list[str] = []
    capsys.readouterr()
    sources.load_source(folder, say=said.append)
    assert said == [f"loading {folder}"]
    assert capsys.readouterr().err == ""
    sources.load_source(folder)
    assert "chatter" in capsys.readouterr().err


def test_gguf_becomes_an_ordinary_float_model(smollm2_folder: Path) -> None:
    # The fixture converted the GGUF file; nothing of its old quantization may remain.
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("name", ["no/such/model/here", "./model", "model.gguf", "/no/where"])
def test_missing_path(name: str) -> None:
    assert error_of(name).startswith(f"{name}: no such file or folder")


def test_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error_of("nobody/no-such-model")
    assert message.startswith("cannot load nobody/no-such-model (no such folder) from the hub:")


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert "not a .gguf" in error_of(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not GGUF",
        b"GGUF",
        b"GGUF" + struct.pack("<I", 3),
        b"GGUF" + struct.pack("<IQQ", 3, 2, 5),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    ],
)
def test_broken_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert f"{path}" in error_of(path)


def test_empty_folder(tmp_path: Path) -> None:
    assert f"cannot load model folder {tmp_path}" in error_of(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    edit_config(save_float(tmp_path), model_type="nonesuch")
    assert "nonesuch" in error_of(tmp_path)


def test_config_that_is_not_json(tmp_path: Path) -> None:
    (save_float(tmp_path) / "config.json").write_text("{")
    assert "JSON" in error_of(tmp_path)


def test_weights_that_are_cut_short(tmp_path: Path) -> None:
    weights = save_float(tmp_path) / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert f"cannot load model folder {tmp_path}" in error_of(tmp_path)


def test_missing_tensor_is_not_made_up(tmp_path: Path) -> None:
    weights = save_float(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert "lack model.layers.1.mlp.down_proj.weight" in error_of(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    byte_model().save_pretrained(tmp_path)
    assert f"tokenizer of model folder {tmp_path}" in error_of(tmp_path)


def test_model_that_is_quantized_otherwise(tmp_path: Path) -> None:
    edit_config(save_float(tmp_path), quantization_config={"quant_method": "gptq"})
    assert "already quantized (gptq)" in error_of(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": "x"},
        {"hidden_size": [1]},
        {"num_attention_heads": 0},
        {"layer_types": 5},
        {"quantization_config": {"quant_method": "sq_cpu", "layers": [["a"]]}},
    ],
)
def test_config_of_wrong_types(tmp_path: Path, entries: dict[str, Any]) -> None:
    edit_config(save_float(tmp_path), **entries)
    assert str(tmp_path) in error_of(tmp_path)


def test_first_line() -> None:
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
