"""The model card: what it says, and that one of somebody's own stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_tokenizer, save_float
from command_line import run
from huggingface_hub import ModelCard
from tiny import batches, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import sq_cpu
from sq_cpu import SqCpuError


def quantized(model: Any, scheme: str = "O3") -> Any:
    calibration = sq_cpu.calibrate(model, batches(), progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)


@pytest.fixture
def model() -> Any:
    return quantized(tiny_model("llama"))


def read(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def test_what_it_says(model: Any, tmp_path: Path) -> None:
    model.config.name_or_path = "someone/tiny-llama"
    card = read(sq_cpu.save(model, tmp_path / "out"))
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.base_model_relation == "quantized"
    assert card.data.pipeline_tag == "text-generation"
    assert {"sq_cpu", "int8", "smoothquant"} <= set(card.data.tags)
    assert card.data.license is None
    text = str(card)
    for part in (
        "# tiny-llama, int8",
        "| scheme | O3: static activations, per_channel weights |",
        "| int8 linears | 14 |",
        "| smoothing | smoothquant, alpha 0.8; 8 groups folded, 0 at run time |",
        "| 1 in float | ignored |",
        "LlamaForCausalLM.from_pretrained(path)",
    ):
        assert part in text
    assert "Measured" not in text
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "README.md" in settings["companions"]


def test_license_and_name_of_a_float_folder(tmp_path: Path) -> None:
    save_float(tmp_path / "nice-model")
    (tmp_path / "nice-model/README.md").write_text("---\nlicense: mit\n---\n# Nice\n")
    model = quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "nice-model"))
    card = read(sq_cpu.save(model, tmp_path / "out"))
    assert card.data.license == "mit"
    assert card.data.base_model is None
    assert "# nice-model, int8" in str(card)
    assert str(tmp_path) not in str(card)


def test_of_no_model_of_transformers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sq_cpu.quantize(model, scheme="O1", smooth=False, progress=False)
    card = read(sq_cpu.save(model, tmp_path / "out"))
    assert card.data.library_name == "sq_cpu"
    assert "sq_cpu.load(path, model=Sequential(...))" in str(card)
    assert "| smoothing | none |" in str(card)


@pytest.mark.parametrize("load", [sq_cpu.load, AutoModelForCausalLM.from_pretrained])
def test_a_loaded_model_brings_it_along(load: Any, model: Any, tmp_path: Path) -> None:
    model.config.name_or_path = "someone/tiny-llama"
    folder = sq_cpu.save(model, tmp_path / "out")
    for text in ((folder / "README.md").read_text(), "my own\n"):
        (folder / "README.md").write_text(text)
        again = sq_cpu.save(load(folder), tmp_path / "again")
        assert (again / "README.md").read_text() == text


def test_another_head_has_a_card_of_its_own(model: Any, tmp_path: Path) -> None:
    folder = sq_cpu.save(model, tmp_path / "out")
    base = AutoModel.from_pretrained(folder)
    again = sq_cpu.save(base, tmp_path / "again")
    text = (again / "README.md").read_text()
    assert "LlamaModel.from_pretrained" in text
    assert "text-generation" not in text
    (folder / "README.md").write_text("my own\n")
    base = AutoModel.from_pretrained(folder)
    assert (sq_cpu.save(base, tmp_path / "mine") / "README.md").read_text() == "my own\n"


@pytest.mark.parametrize("save", [sq_cpu.save, lambda model, path: model.save_pretrained(path)])
def test_ones_own_is_kept(save: Any, model: Any, tmp_path: Path) -> None:
    folder, other = tmp_path / "out", quantized(tiny_model("llama"), "O1")
    save(model, folder)
    save(other, folder)  # ours, unchanged: replaced
    assert "| scheme | O1" in (folder / "README.md").read_text()
    edited = (folder / "README.md").read_text().replace("# Llama", "# My Llama")
    (folder / "README.md").write_text(edited)
    save(model, folder)
    assert (folder / "README.md").read_text() == edited


def test_one_that_lay_there_before(model: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_tags(model: Any, tmp_path: Path) -> None:
    from sq_cpu.checkpoint.card import tagged

    folder = sq_cpu.save(model, tmp_path / "out")
    tagged(folder, ["mine", "yours"])
    assert {"mine", "yours", "sq_cpu"} <= set(read(folder).data.tags)
    sq_cpu.save(model, folder)  # still ours
    assert "mine" not in read(folder).data.tags
    (folder / "README.md").write_text("none")
    with pytest.raises(SqCpuError, match="leave out tags"):
        tagged(folder, ["mine"])


def test_measured_by_the_command(tmp_path: Path) -> None:
    save_float(tmp_path / "float")
    byte_tokenizer()
    done = run(
        "quantize", str(tmp_path / "float"), "-o", str(tmp_path / "out"), "--scheme", "auto",
        "--goal", "50%", "--windows", "4", "--window", "32", "--text-windows", "4", "--json",
    )  # fmt: skip
    picked = json.loads(done.stdout)["picked"]
    text = (tmp_path / "out/README.md").read_text()
    assert "## Measured" in text
    assert f"| int8 | {picked['metric']:.5g} | {picked['loss_percent']:+.2f} %" in text
    assert f"| float | {picked['float_metric']:.5g} |" in text


@pytest.mark.parametrize("source", ["foo/my--model", "../gone", "out/model.", "x/" + "y" * 5000])
def test_what_only_looks_like_a_name_of_the_hub(source: str, model: Any, tmp_path: Path) -> None:
    model.config.name_or_path = source
    assert read(sq_cpu.save(model, tmp_path / "out")).data.base_model is None


def test_a_card_of_another_encoding_stays_as_it_is(model: Any, tmp_path: Path) -> None:
    for text in ("für alle\n".encode("latin-1"), b"---\r\nlicense: mit\r\n---\r\nmine\r\n"):
        out = sq_cpu.save(model, tmp_path / "out")
        (out / "README.md").write_bytes(text)
        sq_cpu.save(model, out)
        assert (out / "README.md").read_bytes() == text
