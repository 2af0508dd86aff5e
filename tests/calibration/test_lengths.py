"""A calibration by the length of the texts, and what is chosen by a task's."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import inputs, tiny_model
from torch import Tensor, nn

import sq_cpu
from sq_cpu import Calibration, SqCpuError, calibrate
from sq_cpu.calibration.calibration import TENSORS

LENGTHS = (8, 16, 40)


def ids(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


SHORT = [ids(2, 5, 1), ids(3, 8, 2), ids(2, 1, 3)]
LONG = [ids(2, 17, 4), ids(1, 40, 5), ids(2, 33, 6), ids(2, 39, 7), ids(1, 20, 8)]
MIXED = [SHORT[0], *LONG[:2], SHORT[1], *LONG[2:], SHORT[2]]


def assert_same(found: Calibration, expected: Calibration) -> None:
    for field in fields(Calibration):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name in TENSORS:
            assert one.keys() == other.keys(), field.name
            assert all(torch.equal(one[name], other[name]) for name in one), field.name
        elif field.name == "example":
            assert torch.equal(one[0][0], other[0][0])
        elif field.name == "head" and one is not None:
            assert_same_head(one, other)
        elif field.name == "by_length":
            assert one.keys() == other.keys()
            for length in one:
                assert_same(one[length], other[length])
        else:
            assert one == other, field.name


def assert_same_head(one: Calibration, other: Calibration) -> None:
    for kind in TENSORS:
        found, expected = getattr(one, kind), getattr(other, kind)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert one.rows_seen == other.rows_seen


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_length_has_what_its_batches_alone_give(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    found = calibrate(model, MIXED, lengths=LENGTHS, gradient_rows=20)
    assert found.lengths == LENGTHS
    assert list(found.by_length) == [8, 40]
    loaded = Calibration.load(found.save(tmp_path / "calibration"))
    assert_same(loaded, found)
    for calibration in (found, loaded):
        for tokens, alone in ((1, SHORT), (8, SHORT), (17, LONG), (40, LONG)):
            assert_same(calibration.for_length(tokens), calibrate(model, alone))
    whole = calibrate(model, MIXED, gradient_rows=20)
    for kind in TENSORS:
        for layer, tensor in getattr(whole, kind).items():
            assert torch.equal(getattr(found, kind)[layer], tensor)
    assert whole.by_length == {}


def test_padding_is_not_length() -> None:
    padded = {"input_ids": ids(2, 30, 9), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    padded["attention_mask"][0, :26] = 0
    padded["attention_mask"][1, :22] = 0
    found = calibrate(tiny_model("llama"), [padded], lengths=LENGTHS)
    assert (list(found.by_length), found.by_length[8].tokens) == ([8], 12)
    embedded = {"inputs_embeds": torch.randn(2, 9, 32)}
    found = calibrate(tiny_model("llama"), [embedded], lengths=LENGTHS)
    assert list(found.by_length) == [16]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((16, 8), "lengths do not ascend"),
        ((8, 8), "lengths do not ascend"),
        ((0, 8), "length is 0, not a whole number >= 1"),
        ((8.5,), "length is 8.5, not a whole number >= 1"),
        ("8", "lengths is no list of numbers"),
        (8, "lengths is no list of numbers"),
        ((8, 39), "has 40 tokens, more than the lengths 8, 39: give a greater one"),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, message: str) -> None:
    with pytest.raises(SqCpuError, match=message) as caught:
        calibrate(tiny_model("llama"), MIXED, lengths=lengths)
    assert "\n" not in str(caught.value)


def test_frames_are_no_tokens() -> None:
    """By position they have the shape of embeddings: [batch, 8 mel bins, frames]."""
    (given, *_) = inputs("whisper")
    batch = (given["input_features"], None, given["decoder_input_ids"])
    for each in (batch, given):
        with pytest.raises(SqCpuError, match=r"token ids, and the Whisper\w+ takes input_features"):
            calibrate(tiny_model("whisper"), [each], lengths=LENGTHS)


def test_batches_without_a_length() -> None:
    with pytest.raises(SqCpuError, match="lengths are of token ids"):
        calibrate(Image(), [torch.randn(2, 4)], lengths=(8,))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(tiny_model("llama"), MIXED, lengths=LENGTHS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (12, "no calibration batch has 9 to 16 tokens, as target_length=12 needs"),
        (41, "target_length is 41, more than the calibration's lengths 8, 16, 40"),
        (0, "target_length is 0, not a whole number >= 1"),
        ("8", "target_length is .*8.*, not a whole number >= 1"),
    ],
)
def test_a_length_that_is_not_there(calibration: Calibration, tokens: Any, message: str) -> None:
    model = tiny_model("llama")
    for call in (
        lambda: calibration.for_length(tokens),
        lambda: sq_cpu.quantize(model, calibration, target_length=tokens),
    ):
        with pytest.raises(SqCpuError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not hasattr(model, "sq_cpu_config")


def test_a_target_without_lengths() -> None:
    model = tiny_model("llama")
    plain = calibrate(model, SHORT)
    with pytest.raises(SqCpuError, match=r"for target_length=300: calibrate with lengths=\(300,\)"):
        sq_cpu.quantize(model, plain, target_length=300)
    with pytest.raises(SqCpuError, match="target_length chooses of a calibration: give one"):
        sq_cpu.quantize(model, smooth=False, target_length=8)


def test_files_of_before_and_damaged_ones(calibration: Calibration, tmp_path: Path) -> None:
    path = calibration.save(tmp_path / "calibration")
    with safe_open(path, framework="pt") as file:
        written = json.loads(file.metadata()["sq_cpu.calibration"])
    tensors = load_file(path)
    assert written["format_version"] == 8

    def changed(**values: Any) -> Path:
        header = json.dumps(written | values)
        save_file(tensors, tmp_path / "changed", {"sq_cpu.calibration": header})
        return tmp_path / "changed"

    for damage in (
        {"lengths": [8]},
        {"lengths": [40, 16, 8]},
        {"lengths": "8"},
        {"by_length": {}},
        {"by_length": written["by_length"] | {"9": written["by_length"]["8"]}},
        {"by_length": written["by_length"] | {"8": {}}},
        {"by_length": written["by_length"] | {"16": written["by_length"]["8"]}},
    ):
        with pytest.raises(SqCpuError, match="is not one that sq_cpu writes"):
            Calibration.load(changed(**damage))
    tensors = {key: tensor for key, tensor in tensors.items() if not key[0].isdecimal()}
    former = {key: value for key, value in written.items() if "length" not in key}
    written = former | {"format_version": 7}
    found = Calibration.load(changed())
    assert (found.lengths, found.by_length) == ((), {})
    assert found.tokens == calibration.tokens
