"""Streamed for a target length: the batches of other lengths are not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float_folders import assert_equal, float_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import SqCpuError, calibrate

LENGTHS = (8, 16, 40)


def ids(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


SHORT = [ids(2, 5, 1), ids(3, 8, 2)]
LONG = [ids(2, 17, 4), ids(1, 40, 5), ids(2, 33, 6)]
MIXED = [SHORT[0], *LONG[:2], SHORT[1], LONG[2]]


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("target", [6, 30])
def test_quantized_for_a_length_in_memory_and_streamed(
    target: int, scheme: str, tmp_path: Path
) -> None:
    source = float_folder(tmp_path / "float", max_position_embeddings=64)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    made = []
    for name, batches in (("by length", MIXED), ("alone", SHORT if target == 6 else LONG)):
        each = model()
        lengths = LENGTHS if name == "by length" else ()
        seen = calibrate(each, batches, lengths=lengths)
        sq_cpu.quantize(each, seen, scheme=scheme, target_length=target if lengths else None)
        made.append(sq_cpu.save(each, tmp_path / name))
    assert_equal(*made)
    sq_cpu.quantize_checkpoint(
        source, tmp_path / "out", MIXED, scheme=scheme, lengths=LENGTHS, target_length=target
    )
    assert_equal(tmp_path / "out", made[0])
    each = model()
    sq_cpu.quantize(each, calibrate(each, MIXED), scheme=scheme)
    other = sq_cpu.save(each, tmp_path / "of all")
    with pytest.raises(AssertionError):
        assert_equal(other, made[0])


def test_streaming_refuses_what_quantize_does(tmp_path: Path) -> None:
    source, out = float_folder(tmp_path / "float"), tmp_path / "out"
    for given, message in (
        ({"batches": MIXED, "target_length": 8}, r"calibrate with lengths=\(8,\)"),
        ({"batches": MIXED, "target_length": 12, "lengths": LENGTHS}, "no calibration batch has 9"),
        ({"batches": MIXED, "lengths": (8,)}, "has 17 tokens, more than the lengths 8"),
        ({"smooth": False, "target_length": 8}, "target_length chooses of batches"),
    ):
        with pytest.raises(SqCpuError, match=message):
            sq_cpu.quantize_checkpoint(source, out, **given)
    assert [each.name for each in tmp_path.iterdir()] == ["float"]
