"""What `load` refuses, in one line, and that it says why."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sameness import assert_same_model
from tiny import change_config
from tiny_checkpoints import Q_PROJ, change_tensors, fails, logits
from transformers import AutoModelForCausalLM

from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.errors import SqCpuError

OLD = Path(__file__).resolve().parent.parent / "data" / "checkpoints"


def test_load_without_config(tmp_path: Path) -> None:
    fails("config.json does not exist", load, tmp_path)
    fails("config.json does not exist", load, tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_load_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    fails("config.json cannot be read as JSON", load, folder)


def edit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("quantization_config"), "has no quantization_config"),
        (edit(quant_method="gptq"), "quant_method is 'gptq', expected 'sq_cpu'"),
        (edit(format_version=10), "format_version 10 is newer than 9.*upgrade sq_cpu"),
        (edit(format_version="1"), "format_version is '1'"),
        (edit(files={}), "lists no files"),
        (edit(files={"../model.safetensors": "0"}), "leaves the folder"),
        (edit(files={"other.safetensors": "0"}), "other.safetensors does not exist"),
        (edit(scheme={"activations": "per_row"}), "bad quantization_config.*activations"),
        (lambda c: c["quantization_config"].pop("scheme"), "bad quantization_config.*scheme"),
        (
            edit(layers=["model.layers.7.mlp"], hadamard={}, misfits={}),
            "layer model.layers.7.mlp is not a linear",
        ),
        (edit(layers=[["a"]]), "bad quantization_config.*layers is not a list of names"),
        (edit(layers="a"), "bad quantization_config.*layers is not a list of names"),
        (edit(misfits=["a"]), "bad quantization_config.*misfits is not a table of layers"),
        (edit(misfits={Q_PROJ: 1.5}), "misfits is not a table of layers and shares"),
        (edit(misfits={Q_PROJ: "0"}), "misfits is not a table of layers and shares"),
        (edit(misfits={"lm_head": 0.5}), "misfits names lm_head, which is not one of layers"),
        (edit(format_version=True), "format_version is True"),
        (lambda c: c.update(hidden_size="x"), "config.json: .*cannot build this model.*hidden_s"),
        (lambda c: c.update(num_attention_heads=0), "config.json: .*cannot build this model"),
        (
            edit(layers=["model.norm"], hadamard={}, misfits={}),
            "layer model.norm is not a linear of LlamaForCausalLM",
        ),
        (
            lambda c: c.update(architectures=["Nonesuch"]),
            "holds a Nonesuch, which transformers cannot",
        ),
        (lambda c: c.update(model_type="nonesuch"), "cannot build this model.*nonesuch"),
    ],
)
def test_load_bad_config(folder: Path, change: Callable[..., object], match: str) -> None:
    change_config(folder, change)
    fails(match, load, folder)


def test_load_bit_flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    fails("model.safetensors is damaged", load, folder)
    load(folder, verify=False)


def edit_beside(folder: Path) -> None:
    """Edit what is no part of the quantization: the configs, a chat template, the tokenizer."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | {"use_cache": False, "custom": [1]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained])
def test_what_is_beside_the_quantization_may_be_edited(folder: Path, reader: Any) -> None:
    before = load(folder)
    edit_beside(folder)
    after = reader(folder)
    assert_same_model(after, before, logits)
    assert after.config.use_cache is after.generation_config.use_cache is False
    change = '"activations": "static"'
    text = (folder / "config.json").read_text()
    assert change in text
    (folder / "config.json").write_text(text.replace(change, '"activations": "per_token"'))
    fails("config.json is damaged or was edited.*verify=False", reader, folder)


@pytest.mark.parametrize("name", ["tuned", "version-4-mixed"])
@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained])
def test_digests_of_companions_in_old_checkpoints_are_ignored(
    name: str, reader: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(OLD / name, tmp_path / name))
    edit_beside(folder)
    assert reader(folder).config.use_cache is False


def test_load_does_not_mind_the_layout_of_config_json(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    load(folder)


def test_load_bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    fails("generation_config.json cannot be read as JSON", load, folder)
    (folder / "generation_config.json").write_text('{"temperature": {}, "pad_token_id": []}')
    fails("cannot load .*generation_config.json", load, folder)


def mutate(content: Any, random: random.Random) -> None:
    """Delete or overwrite one field, at any depth."""
    fields = []
    stack = [content]
    while stack:
        node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            fields.append((node, key))
            if isinstance(value, dict | list):
                stack.append(value)
    node, key = random.choice(fields)
    values = [None, True, -1, 0, 3, 2.5, "", "x", [], ["a"], [["a"]], {}, {"a": 1}, 10**12]
    if key == "num_hidden_layers":
        values.remove(10**12)  # so many would be built, one after another
    if random.random() < 0.1:
        del node[key]
    else:
        node[key] = random.choice(values)


@pytest.mark.filterwarnings("ignore")
def test_load_of_any_config_works_or_says_why(folder: Path) -> None:
    path = folder / "config.json"
    content = path.read_text()
    generator = random.Random(0)
    messages = []
    for _ in range(500):
        mutated = json.loads(content)
        mutate(mutated, generator)
        path.write_text(json.dumps(mutated))
        try:
            load(folder, verify=False)
        except SqCpuError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 490  # else they test too little
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("size", [-1, 100, 4, 0])
def test_load_truncated(folder: Path, size: int, verify: bool) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails("model.safetensors is damaged", load, folder, verify=verify)


def test_load_missing_shard(quantized_llama: Any, tmp_path: Path) -> None:
    folder = save(quantized_llama, tmp_path / "out", max_shard_size=6000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    fails(f"{shard.name} does not exist", load, folder)


WEIGHT = f"{Q_PROJ}.weight"


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.update({WEIGHT: t[WEIGHT][1:].clone()}),
            rf"tensor {WEIGHT} is int8 \[47, 48, 1\], expected int8 \[48, 48, 1\]",
        ),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].float()}),
            rf"tensor {WEIGHT} is float32 \[48, 48, 1\], expected int8 \[48, 48, 1\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)}),
            r"input_scale is float32 \[1\], expected float32 \[\]",
        ),
        (
            lambda t: t.update({NORM: torch.ones(3)}),
            rf"tensor {NORM} is float32 \[3\], expected a float dtype \[48\]",
        ),
        (
            lambda t: t.update({NORM: t[NORM].to(torch.int8)}),
            rf"tensor {NORM} is int8 \[48\], expected a float dtype \[48\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.input_scale": torch.tensor(torch.nan)}),
            f"/out: layer {Q_PROJ}: ",
        ),
        (lambda t: t.pop(NORM), rf"tensor {NORM} missing"),
        (lambda t: t.pop(WEIGHT), rf"tensor {WEIGHT} missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"2 tensors \(lm_head.weight, model.emb"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor extra not expected"),
    ],
)
def test_load_bad_tensors(folder: Path, change: Callable[..., object], match: str) -> None:
    change_tensors(folder, change)
    fails(match, load, folder)


def test_load_tensor_in_two_files(folder: Path) -> None:
    save_file({NORM: torch.ones(48)}, folder / "more.safetensors")
    digest = hashlib.sha256((folder / "more.safetensors").read_bytes()).hexdigest()
    change_config(
        folder,
        lambda c: c["quantization_config"]["files"].update({"more.safetensors": digest}),
    )
    fails(f"tensor {NORM} is in both", load, folder)


def test_load_bad_dtype(folder: Path) -> None:
    fails("dtype is torch.int8", load, folder, dtype=torch.int8)
