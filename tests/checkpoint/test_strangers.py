"""Checkpoints where they are not expected: with stock transformers, with code, with other files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_models import save_float
from command_line import error_of
from sameness import assert_same_model
from tiny import batches, change_config, tiny_model
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


# --- other files ----------------------------------------------------------------------------------


READERS = [sq_cpu.load, AutoModelForCausalLM.from_pretrained]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a checkpoint of several files."""
    model = sq_cpu.quantize(tiny_model("llama"), smooth=False)
    return sq_cpu.save(model, tmp_path / "out", max_shard_size="20KB")


def test_an_index_that_names_files_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    elsewhere = Path(shutil.copytree(folder, folder.with_name("elsewhere")))
    expected = sq_cpu.load(folder)
    text = index.read_text()
    for where in (f"{elsewhere}/", "../elsewhere/"):
        index.write_text(text.replace('"model-', f'"{where}model-', 1))
        assert_same_model(sq_cpu.load(folder), expected)  # which does not need it
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("reader", READERS)
def test_links_to_files_elsewhere_are_read(reader: Any, folder: Path) -> None:
    # As in the cache of the hub's client.
    expected = sq_cpu.load(folder)
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert_same_model(reader(folder), expected)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "safetensors"])
def test_what_is_no_file(name: str, folder: Path) -> None:
    (path, *_) = folder.glob(f"*{name}")
    path.unlink()
    os.mkfifo(path)
    fails("cannot be read as JSON|does not exist", sq_cpu.load, folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    fails("cannot be read as JSON|does not exist", sq_cpu.load, folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_too_large(name: str, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 30)
    fails("larger than 64 MB", sq_cpu.load, folder)


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


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(key: str, tmp_path: Path) -> None:
    folder = save_float(tmp_path / "float")
    int8 = sq_cpu.save(sq_cpu.quantize(load_source(folder)[0], smooth=False), tmp_path / "int8")
    for path, reader in ((folder, load_source), (int8, load_source), (int8, sq_cpu.load)):
        change_config(path, lambda content: content.update({key: "someone/kernels"}))
        fails("asks for a kernel of the hub, someone/kernels", reader, path)


def test_code_that_is_not_needed_does_not_run(own: Path, tmp_path: Path) -> None:
    content = json.loads((own / "config.json").read_text())
    content |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (own / "config.json").write_text(json.dumps(content))
    load_source(own)
    assert not (tmp_path / "ran").exists()


def test_code_is_not_streamed(tmp_path: Path) -> None:
    given = ("quantize", tmp_path, "-o", tmp_path / "out", "--stream", "--trust-remote-code")
    assert "leave out --stream or --trust-remote-code" in error_of(*given)
