"""Folders of sentence-transformers through the commands: they stay such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_models import byte_tokenizer
from command_line import error_of, run
from safetensors.torch import load_file
from sample_files import write_model, write_pairs
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision")
SMALL = ("--windows", 4, "--window", 24)


def sentence_encoder(folder: Path) -> Path:
    """Write what sentence-transformers saves: a base model, pooled."""
    tiny_model("bert", vocab_size=259).bert.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    of = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{of}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{of}.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def add_pooler(folder: Path) -> None:
    """Complete the weights, as a BertModel has a pooler and a BertForMaskedLM has none."""
    config = transformers.BertConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.save_pretrained(folder)


def test_a_sentence_encoder_is_one_afterwards(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder, out = sentence_encoder(tmp_path / "float"), tmp_path / "out"
    add_pooler(folder)
    pairs = write_pairs(tmp_path / "pairs.tsv")
    for _ in range(2):  # the second replaces the first, subfolders too
        run("quantize", folder, "-o", out, "--overwrite", "--calib", pairs, *SMALL)
    texts = ["one text", "and quite another", "a third"]
    float_, int8 = (
        library.SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True)
        for path in (folder, out)
    )
    assert not torch.equal(float_, int8)
    assert torch.cosine_similarity(float_, int8).min() > 0.98
    assert (out / "1_Pooling/config.json").read_text() == (
        folder / "1_Pooling/config.json"
    ).read_text()


def test_a_cross_encoder_is_one_afterwards(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder, out = tmp_path / "float", tmp_path / "out"
    library.CrossEncoder(str(write_model("cross-encoder", tmp_path / "plain"))).save_pretrained(
        str(folder)
    )
    assert (folder / "modules.json").is_file()  # which is of no pooled encoder
    run("quantize", folder, "-o", out, "--calib", write_pairs(tmp_path / "pairs.tsv"), *SMALL)
    pairs = [("one text", "and another"), ("a", "b")]
    float_, int8 = (
        library.CrossEncoder(str(path), device="cpu").predict(pairs, convert_to_tensor=True)
        for path in (folder, out)
    )
    assert not torch.equal(float_, int8)
    assert (float_ - int8).abs().max() < 0.05 * float_.abs().max()


def pooled(folder: Path, model: Any) -> Path:
    sentence_encoder(folder)
    model.save_pretrained(folder)
    return folder


def test_other_sentence_encoders_stay_such(tmp_path: Path) -> None:
    """Of a causal language model, and of an encoder that is a base itself."""
    sizes = {"vocab_size": 259, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    encoder = transformers.T5EncoderModel(transformers.T5Config(d_kv=8, **sizes))
    for name, model, kind in (
        ("llama", tiny_model("llama", vocab_size=259), "LlamaModel"),
        ("t5", encoder, "T5EncoderModel"),
    ):
        folder, out = pooled(tmp_path / name, model), tmp_path / f"{name}-out"
        run("quantize", folder, "-o", out, *SMALL)
        assert json.loads((out / "config.json").read_text())["architectures"] == [kind]
        assert (out / "1_Pooling/config.json").is_file()
        assert (out / "modules.json").is_file()


def test_links_out_of_a_sentence_encoder_are_refused(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "float")
    add_pooler(folder)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("x")
    (folder / "1_Pooling/key").symlink_to(tmp_path / "secret/key")
    error = error_of("quantize", folder, "-o", tmp_path / "out", *SMALL)
    assert "1_Pooling/key is a link out of the model's folder" in error
    assert not (tmp_path / "out").exists()


def test_modules_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "float")
    add_pooler(folder)
    for path in ("../float", "/etc"):
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))
        error = error_of("quantize", folder, "-o", tmp_path / "out", *SMALL)
        assert f"modules.json: {path} is no folder beside it" in error
    (folder / "modules.json").write_text('{"a": 1}')
    assert "modules.json" in error_of("quantize", folder, "-o", tmp_path / "out", *SMALL)
    assert not (tmp_path / "out").exists()
