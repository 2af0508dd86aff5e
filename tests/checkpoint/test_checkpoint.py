"""Checkpoints: bit-for-bit round trips, one-line errors, and nothing half-written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sameness import assert_same_model, assert_to_rounding, logits_of_a_fresh_process
from tiny import batches, change_config, mixed_plan, tiny_model
from tiny import logits as tiny_logits
from tiny_checkpoints import (
    IDS,
    Q_PROJ,
    VOCABULARY,
    change_tensors,
    fails,
    logits,
    one_token,
    quantized,
    tiny_llama,
    tiny_opt,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.quantize import quantize
from sq_cpu.quantization.replace import replace_linears
from sq_cpu.scheme import Scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_round_trip(make: Any, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(make(dtype), scheme)
    model.generation_config.max_new_tokens = 7

    assert save(model, tmp_path / "out") == tmp_path / "out"
    loaded: Any = load(tmp_path / "out")

    assert_same_model(loaded, model, logits)
    assert loaded.sq_cpu_config == model.sq_cpu_config
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.dtype == loaded.config.dtype == dtype
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    for (name, buffer), (other, expected) in zip(
        loaded.named_buffers(), model.named_buffers(), strict=True
    ):
        assert name == other
        assert buffer.dtype == expected.dtype
        assert torch.equal(buffer, expected)
    assert {n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)} == set(
        model.sq_cpu_config.layers
    )


def test_buffers_that_are_not_stored_are_those_of_from_pretrained(tmp_path: Path) -> None:
    # GPT-J's sinusoids: made in bf16 they would be those of other frequencies.
    made = tiny_model("gptj", dtype=torch.bfloat16, n_positions=512, vocab_size=VOCABULARY)
    made.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    loaded: Any = load(save(quantize(model, smooth=False), tmp_path / "int8"))
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer)
    assert_same_model(loaded, model, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "opt-350m", "mixtral"])
def test_mixed_plans(name: str, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # From a file: tiny_model rounds the rotary frequencies, which load makes anew.
    tiny_model(name, dtype=dtype).save_pretrained(tmp_path / "float")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    calibration = calibrate(model, batches())
    quantize(model, calibration, mixed_plan(model, calibration, Scheme.of(scheme)))
    out = save(model, tmp_path / "out")
    assert '"curve"' not in (out / "config.json").read_text()
    text = (out / "search_curves.json").read_text()
    assert text.count(": [[0.0, 2.0], [0.7, 0.333333]]") == len(model.sq_cpu_config.plan.groups)
    for loaded in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert_same_model(loaded, model, tiny_logits, one_token)
        assert loaded.sq_cpu_config == model.sq_cpu_config
        for path in model.sq_cpu_config.layers:
            pair = loaded.get_submodule(path), model.get_submodule(path)
            if path in model.sq_cpu_config.decomposed:
                pair = pair[0].regular, pair[1].regular
            assert pair[0].scheme == pair[1].scheme
    again = save(load(out), tmp_path / "again")
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_checkpoints_of_version_2_are_read(folder: Path) -> None:
    def flat(tensors: dict[str, torch.Tensor]) -> None:
        int8 = {name: t[..., 0] for name, t in tensors.items() if t.dtype == torch.int8}
        tensors.update({name: tensor.clone() for name, tensor in int8.items()})

    before = load(folder)
    change_tensors(folder, flat)
    change_config(folder, lambda c: c["quantization_config"].update(format_version=2))
    assert_same_model(load(folder), before, logits)


def test_rows_of_former_static_checkpoints_keep_the_static_scale(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize(model, calibrate(model, [IDS]), scheme="O3")
    folder = save(model, tmp_path / "out")
    assert load(folder).sq_cpu_config.scheme == Scheme.of("O3")

    def former(config: dict[str, Any]) -> None:
        del config["quantization_config"]["scheme"]["dynamic_fallback"]
        config["quantization_config"].update(format_version=7)

    change_config(folder, former)
    loaded = load(folder)
    assert loaded.sq_cpu_config.scheme == Scheme.of("O3", dynamic_fallback=False)
    layer = loaded.get_submodule(Q_PROJ)
    x = torch.full((2, layer.in_features), 1e6)
    assert layer.quantize_input(x).scale.tolist() == [layer.input_scale] * 2
    assert (layer(x) - model.get_submodule(Q_PROJ)(x)).abs().max() > 1e5


def test_a_layer_with_a_smoothing_of_its_own(tmp_path: Path) -> None:
    model = tiny_llama()
    linear = model.get_submodule(Q_PROJ)
    s = torch.rand(linear.in_features) + 0.1
    quantized(model, "O1")
    with torch.no_grad():
        layer = QuantLinear.from_float(linear, model.sq_cpu_config.scheme, smoothing=s)
    replace_linears(model, {Q_PROJ: layer})
    out = save(model, tmp_path / "out")

    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["format_version"], settings["smoothed"]) == (9, [Q_PROJ])
    loaded: Any = load(out)
    assert_same_model(loaded, model, logits)
    assert torch.equal(loaded.get_submodule(Q_PROJ).smoothing, s)
    assert loaded.sq_cpu_config.smoothed == (Q_PROJ,)
    again = save(loaded, tmp_path / "again")
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()

    change_config(out, lambda c: c["quantization_config"].update(smoothed=["lm_head"]))
    fails("smoothed names lm_head, which is not one of layers", load, out)
    change_tensors(again, lambda tensors: tensors.pop(f"{Q_PROJ}.smoothing"))
    fails("q_proj.smoothing missing", load, again)


def test_without_a_smoothing_there_is_no_list_of_them(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 9
    assert "smoothed" not in settings


def assert_same_in_a_fresh_process(models: dict[str, Any], folder: Path) -> None:
    for name, model in models.items():
        save(model, folder / name)
    found = logits_of_a_fresh_process(models, IDS, folder)
    for name, model in models.items():
        assert_to_rounding(found[name], logits(model), model.dtype)


def test_fresh_process(quantized_llama: Any, tmp_path: Path) -> None:
    mixed = tiny_opt()
    calibration = calibrate(mixed, [IDS], progress=False)
    quantize(mixed, calibration, mixed_plan(mixed, calibration, Scheme.of("O3")))
    models = {
        "llama O1": quantized(tiny_llama(torch.bfloat16), "O1"),
        "opt O2": quantized(tiny_opt(torch.float16), "O2"),
        "llama O3": quantized_llama,
        "opt mixed": mixed,
    }
    assert_same_in_a_fresh_process(models, tmp_path)


def test_fresh_process_real_model(smollm2: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    assert_same_in_a_fresh_process({"O3": quantized(smollm2()[0])}, tmp_path)


def test_saving_what_was_loaded_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = save(load(folder), tmp_path / "again")
    assert {p.name for p in again.iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_stored_tensors_are_unpacked_int8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = load(folder).get_submodule(Q_PROJ)
    assert isinstance(layer, QuantLinear)
    assert torch.equal(tensors[f"{Q_PROJ}.weight"], layer.weight_int8()[..., None])
    assert tensors[f"{Q_PROJ}.weight"].dtype == torch.int8
    assert torch.equal(tensors[f"{Q_PROJ}.weight_scale"], layer.weight_scale)
    assert tensors[f"{Q_PROJ}.input_scale"].shape == ()
    assert tensors[f"{Q_PROJ}.input_zero_point"].dtype == torch.int32


def test_tied_head_is_stored_once_and_tied_again(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded: Any = load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_untied_head(tmp_path: Path) -> None:
    model = quantized(tiny_llama(tied=False))
    loaded: Any = load(save(model, tmp_path / "out"))
    assert_same_model(loaded, model, logits)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    model = quantized(tiny_llama(), Scheme(ignore=()))
    loaded: Any = load(save(model, tmp_path / "out"))
    assert_same_model(loaded, model, logits)
    assert isinstance(loaded.lm_head, QuantLinear)


def test_shards(tmp_path: Path) -> None:
    model = quantized(tiny_llama(torch.bfloat16))
    folder = save(model, tmp_path / "out", max_shard_size=6000)
    files = {path.name for path in folder.glob("*.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(settings["files"]) == files
    assert_same_model(load(folder), model, logits)


def test_dtype_changes_what_is_not_quantized_alone(folder: Path) -> None:
    stored: Any = load(folder)
    loaded: Any = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    for name in stored.sq_cpu_config.layers:
        assert torch.equal(loaded.get_submodule(name).packed, stored.get_submodule(name).packed)
    # Between the two lie bf16's 8 bits, through two blocks.
    torch.testing.assert_close(logits(loaded).float(), logits(stored), atol=0.02, rtol=0.1)


def test_parameters_are_their_own_memory(folder: Path) -> None:
    loaded = load(folder)
    before = logits(loaded)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(logits(loaded), before)


def test_tokenizer_is_saved(quantized_llama: Any, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "smooth": 1, "quant": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    folder = save(quantized_llama, tmp_path / "out", tokenizer)
    again = PreTrainedTokenizerFast.from_pretrained(folder)
    assert again("smooth quant x").input_ids == [1, 2, 0]
    companions = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "tokenizer.json" in companions["companions"]


def test_no_pickle(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.keys()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name == "README.md"
            assert path.read_text(encoding="ascii")


def test_files_have_the_mode_of_the_umask(quantized_llama: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(quantized_llama, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
