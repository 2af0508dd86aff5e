"""Checkpoints where they are not expected: with stock transformers, with code, with other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from byte_models import save_float
from command_line import error_of
from sameness import assert_same_model
from tiny import batches, tiny_model
from tiny_checkpoints import fails
from torch import nn
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import LayerPlan, SmoothPlan
from sq_cpu.checkpoint.sources import load_source

# --- stock transformers ---------------------------------------------------------------------------

_STOCK = """
import sys
import warnings
from transformers import AutoConfig
import transformers

warnings.simplefilter("ignore")
for folder in sys.argv[1:]:
    name = AutoConfig.from_pretrained(folder).architectures[0]
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError as error:
        assert "ize mismatch" in str(error) or "ismatched" in str(error), error
    else:
        print(folder, "was loaded")
assert "sq_cpu" not in sys.modules
"""


def test_stock_transformers_refuses(tmp_path: Path) -> None:
    models: dict[str, nn.Module] = {
        name: sq_cpu.quantize(tiny_model(name), smooth=False)
        for name in ("llama", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral", "bert")
    }
    outliers = tiny_model("llama")
    names = [name for name, module in outliers.named_modules() if type(module) is nn.Linear]
    layers = tuple(LayerPlan(name=name, outliers=(1,)) for name in names if name != "lm_head")
    calibration = sq_cpu.calibrate(outliers, batches(), progress=False)
    models["all decomposed"] = sq_cpu.quantize(outliers, calibration, SmoothPlan((), layers))
    for name, model in models.items():
        sq_cpu.save(model, tmp_path / name, max_shard_size="20KB")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", _STOCK, *(str(tmp_path / name) for name in models)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (output.returncode, output.stdout) == (0, ""), output.stderr


# --- code from a model's folder -------------------------------------------------------------------

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({mark!r}, "w").close()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a float model's folder with code of its own, which makes the file "ran" if it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own"
    add_code(save_float(folder), tmp_path / "ran")
    return folder


def add_code(folder: Path, mark: Path) -> None:
    (folder / "own.py").write_text(_CODE.format(mark=str(mark)))
    content = json.loads((folder / "config.json").read_text())
    content["model_type"] = "own"
    content["architectures"] = ["OwnModel"]
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "MODEL", "--windows", "1", "--window", "8"],
        ["generate", "MODEL", "a", "--max-new-tokens", "1"],
        ["inspect", "MODEL", "--windows", "1", "--window", "8"],
        ["quantize", "MODEL", "-o", "OUT", "--windows", "1", "--window", "8"],
        ["quantize", "MODEL", "-o", "OUT", "--windows", "1", "--window", "8", "--stream"],
        ["tune", "MODEL", "-o", "OUT.json", "--windows", "1", "--window", "8"],
    ],
    ids=lambda arguments: " ".join(arguments[::5]),
)
def test_code_does_not_run_unless_asked(arguments: list[str], own: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(own), "OUT": str(tmp_path / "o"), "OUT.json": str(tmp_path / "o.json")}
    arguments = [places.get(word, word) for word in arguments]
    assert "--trust-remote-code" in error_of(*arguments)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_code_runs_where_asked(own: Path, tmp_path: Path) -> None:
    fails("auto_map.*trust_remote_code=True", load_source, own)
    assert not (tmp_path / "ran").exists()
    model, tokenizer = load_source(own, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    sq_cpu.quantize(model, smooth=False)
    folder = sq_cpu.save(model, tmp_path / "int8", tokenizer)
    (tmp_path / "ran").unlink()
    add_code(folder, tmp_path / "ran")
    for reader in (sq_cpu.load, load_source):
        fails("auto_map.*trust_remote_code=True", reader, folder)
    assert not (tmp_path / "ran").exists()
    expected = sq_cpu.load(folder, trust_remote_code=True)
    assert_same_model(expected, model)
    found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert_same_model(found, model)


def test_code_that_is_not_needed_does_not_run(own: Path, tmp_path: Path) -> None:
    content = json.loads((own / "config.json").read_text())
    content |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (own / "config.json").write_text(json.dumps(content))
    load_source(own)
    assert not (tmp_path / "ran").exists()
