"""Checkpoints of models that have a prefix: as they were, and refused where that is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import change_config
from tiny_checkpoints import IDS, VOCABULARY, change_tensors, fails, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.inference.prefix import prefix_of, use_prefix

PREFIX = tuple(IDS[0, :2].tolist())
ROOT = "sq_cpu_prefix"


def with_prefix(dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_llama(dtype)
    calibration = sq_cpu.calibrate(model, [IDS], prefix=PREFIX, progress=False)
    return sq_cpu.quantize(model, calibration, scheme="O3", progress=False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(with_prefix(), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_as_it_was(tmp_path: Path, dtype: torch.dtype, shards: str) -> None:
    model = with_prefix(dtype)
    folder = save(model, tmp_path / "out", max_shard_size=shards)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["prefix"] == [*PREFIX]
    for read in (load, AutoModelForCausalLM.from_pretrained):
        loaded = read(folder)
        assert loaded.sq_cpu_config.prefix == PREFIX
        assert torch.equal(logits(loaded), logits(model))
        found, made = prefix_of(loaded), prefix_of(model)
        assert found is not None
        assert made is not None
        assert found.ids == made.ids == PREFIX
        for a, b in zip(found.keys, made.keys, strict=True):
            assert torch.equal(a, b)
        use_prefix(loaded, None)
        assert not torch.equal(logits(loaded), logits(model))
    again = save(load(folder), tmp_path / "again")
    assert torch.equal(logits(load(again)), logits(model))


def test_in_another_dtype(folder: Path) -> None:
    prefix = prefix_of(load(folder, dtype=torch.bfloat16))
    assert prefix is not None
    assert {x.dtype for x in (*prefix.keys, *prefix.values, prefix.hidden)} == {torch.bfloat16}


def test_one_that_was_taken_off_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    use_prefix(model, None)
    plain = load(save(model, tmp_path / "plain"))
    assert prefix_of(plain) is None
    assert torch.equal(logits(plain), logits(model))


def test_a_checkpoint_of_before(tmp_path: Path) -> None:
    model = with_prefix()
    use_prefix(model, None)
    folder = save(model, tmp_path / "out")
    change_config(folder, lambda c: c["quantization_config"].update(format_version=7))
    assert torch.equal(logits(load(folder)), logits(model))


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{ROOT}.{name}")


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{ROOT}.{name}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("1.key"), f"tensor {ROOT}.1.key of the prefix missing"),
        (drop("hidden"), f"tensor {ROOT}.hidden of the prefix missing"),
        (put("2.key", torch.zeros(2, 2, 12)), f"{ROOT}.2.key of the prefix not expected"),
        (put("x", torch.zeros(1)), f"{ROOT}.x of the prefix not expected"),
        (put("0.key", torch.zeros(2, 3, 12)), r"0.key is float32 \[2, 3, 12\], not that of a"),
        (put("0.key", torch.zeros(2, 12)), r"0.key is float32 \[2, 12\], not that of a"),
        (put("0.value", torch.zeros(2, 2, 12).int()), r"0.value is int32 \[2, 2, 12\]"),
        (put("0.value", torch.zeros(0, 2, 12)), r"0.value is float32 \[0, 2, 12\]"),
        (put("hidden", torch.zeros(1, 48)), r"hidden is float32 \[1, 48\], not that"),
        (put("1.value", torch.full((2, 2, 12), torch.nan)), "1.value has NaN or Inf"),
        (put("hidden", torch.full((2, 48), torch.inf)), "hidden has NaN or Inf"),
    ],
)
def test_damaged_tensors(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    fails(message, load, folder)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([], "tensor sq_cpu_prefix.0.key of a prefix that it has not"),
        ("a", "prefix is not a list of token ids"),
        ([True, 1], "prefix is not a list of token ids"),
        ([1] * 9, "prefix has 9 tokens, more than 8"),
        ([0, VOCABULARY], "is not of its vocabulary"),
        ([-1, 0], "is not of its vocabulary"),
        ([0], "not that of a prefix of 1 tokens"),
    ],
)
def test_damaged_settings(folder: Path, prefix: Any, message: str) -> None:
    change_config(folder, lambda c: c["quantization_config"].update(prefix=prefix))
    fails(message, load, folder)


def test_a_prefix_of_other_shapes_is_told_when_it_is_used(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{ROOT}.0.key"] = torch.zeros(4, 2, 12)

    change_tensors(folder, change)
    fails("the prefix has 4 kv heads of 12 channels for layer 0", logits, load(folder))

    def change_hidden(tensors: dict[str, Tensor]) -> None:
        tensors[f"{ROOT}.0.key"] = torch.zeros(2, 2, 12)
        tensors[f"{ROOT}.hidden"] = torch.zeros(2, 47)

    change_tensors(folder, change_hidden)
    fails("hidden states of 47 channels, the model of 48", logits, load(folder))
