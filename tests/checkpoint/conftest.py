"""A tiny quantized model, and its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import quantized, tiny_llama

from sq_cpu.checkpoint.save import save


@pytest.fixture(scope="module")
def quantized_llama() -> Any:
    """Give a tiny LLaMA, O3, fp32; tests leave it as it is."""
    return quantized(tiny_llama())


@pytest.fixture(scope="module")
def template(quantized_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(quantized_llama, tmp_path_factory.mktemp("template") / "out")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """Give a checkpoint of that model that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "out"))
