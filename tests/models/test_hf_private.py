"""transformers' private names stand in one file, and are not used with another major version."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model

import sq_cpu
from sq_cpu.errors import SqCpuError
from sq_cpu.models import hf_private
from sq_cpu.models.linears import linearize

PRIVATE = re.compile(
    r"transformers\.(initialization|core_model_loading|conversion_mapping|modeling_utils)\b"
    r"|_is_hf_initialized|all_tied_weights_keys|_from_config|_get_dtype_plan|_keys_to_ignore"
    r"|HF_DEACTIVATE_ASYNC_LOAD|\.hf_quantizer\."
    r"|\b(has_gate|is_transposed|_apply_gate|has_post_expert_norm)\b"
)
# What transformers asks a quantizer to override: private by name, but not from inside of it.
EXTENSION = re.compile(r"\b_process_model_\w+")


def users(names: re.Pattern[str]) -> set[str]:
    (folder,) = sq_cpu.__path__
    return {
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*.py")
        if names.search(path.read_text(encoding="utf-8"))
    }


def test_private_names_stand_in_one_file() -> None:
    assert users(PRIVATE) == {"models/hf_private.py"}
    assert users(EXTENSION) == {"checkpoint/hf_quantizer.py"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = sq_cpu.quantize(tiny_model("llama"), smooth=False)
    return sq_cpu.save(model, tmp_path / "int8")


CALLS: dict[str, Callable[[Path, Any], object]] = {
    "load": lambda folder, _: sq_cpu.load(folder),
    "from_pretrained": lambda folder, _: transformers.AutoModelForCausalLM.from_pretrained(folder),
    "save": lambda folder, model: sq_cpu.save(model, folder.with_name("again")),
    "stream": lambda folder, _: sq_cpu.quantize_checkpoint(
        folder.with_name("float"), folder.with_name("streamed"), smooth=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_major_version_is_refused_in_one_line(
    call: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sq_cpu.load(checkpoint)
    tiny_model("llama").save_pretrained(tmp_path / "float")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    with pytest.raises(SqCpuError, match=r"transformers 6\.0\.0 .* 'transformers>=5,<6'") as caught:
        CALLS[call](checkpoint, model)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_experts_of_another_major_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, dense = tiny_model("mixtral"), tiny_model("llama")
    modules = dict(mixture.named_modules())
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    with pytest.raises(SqCpuError, match=r"transformers 6\.0\.0 .* 'transformers>=5,<6'"):
        linearize(mixture)
    assert dict(mixture.named_modules()) == modules
    assert linearize(dense) == {}


@pytest.mark.parametrize("threads", [None, "0"])
def test_loading_leaves_transformers_settings_as_they_were(
    threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    if threads is not None:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", threads)
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        source, target = tiny_model("llama", seed=1), tiny_model("llama")
        name = "model.norm.weight"
        with torch.no_grad():
            source.get_parameter(name).fill_(3.0)
        info = hf_private.CheckpointLayout(target).load({name: source.get_parameter(name).data})
        assert not info.mismatched_keys
        assert torch.equal(target.get_parameter(name), source.get_parameter(name))
        assert logging.is_progress_bar_enabled()
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == threads
