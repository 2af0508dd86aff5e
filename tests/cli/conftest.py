"""What the tests of the commands work on: a float model, a text, an int8 model, a plan."""

from pathlib import Path

import pytest
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT
from tiny import batches, mixed_plan

import sq_cpu
from sq_cpu import Scheme


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_float(tmp_path / "float")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = sq_cpu.quantize(byte_model(), smooth=False)
    return sq_cpu.save(model, tmp_path / "int8", byte_tokenizer())


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Write a plan for the models of `folder` that mixes; its scheme is asymmetric O3."""
    model = byte_model()
    calibration = sq_cpu.calibrate(model, batches())
    scheme = Scheme.of("O3", symmetric=False)
    return mixed_plan(model, calibration, scheme).save(tmp_path / "plan.json")
