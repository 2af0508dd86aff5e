"""Checkpoints: bit-for-bit round trips, one-line errors, and nothing half-written."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sameness import assert_same_model, assert_to_rounding, logits_of_a_fresh_process
from tiny import batches, change_config, mixed_plan, tiny_model
from tiny import logits as tiny_logits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint import checkpoint
from sq_cpu.checkpoint.checkpoint import load, save
from sq_cpu.errors import SqCpuError
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.quantize import quantize
from sq_cpu.quantization.replace import replace_linears
from sq_cpu.scheme import Scheme

VOCABULARY = 97
IDS = torch.arange(24).reshape(2, 12) * 31 % VOCABULARY
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def tiny_opt(dtype: torch.dtype = torch.float32) -> Any:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=48,
    )
    torch.manual_seed(0)
    return OPTForCausalLM._from_config(config, dtype=dtype).eval()


def quantized(model: Any, scheme: str | Scheme = "O3") -> Any:
    ignore = Scheme.of(scheme).ignore
    calibration = calibrate(model, [IDS], ignore=ignore, progress=False)
    return quantize(model, calibration, scheme=scheme)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def one_token(model: nn.Module) -> torch.Tensor:
    """Return the logits of one row: torch multiplies it in another order than several."""
    with torch.no_grad():
        return model(IDS[:1, :1] + 1).logits  # type: ignore[no-any-return]


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


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the one safetensors file, its hash brought up to date."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_config(folder, lambda c: c["quantization_config"]["files"].update({path.name: digest}))


def fails(match: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(SqCpuError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


# --- round trips --------------------------------------------------------------------------------


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
    text = (out / "config.json").read_text()
    assert '"curve": [[0.0, 2.0], [0.7, 0.333333]]\n' in text
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
    before = load(folder)
    change_config(folder, lambda c: c["quantization_config"].update(format_version=2))
    assert_same_model(load(folder), before, logits)


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
    assert (settings["format_version"], settings["smoothed"]) == (3, [Q_PROJ])
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


def test_without_a_smoothing_the_format_is_the_first(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 3
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
    assert torch.equal(tensors[f"{Q_PROJ}.weight"], layer.weight_int8())
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
        else:
            assert path.suffix == ".json"
            json.loads(path.read_text())


def test_files_have_the_mode_of_the_umask(quantized_llama: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(quantized_llama, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# --- what save refuses, and leaves behind -------------------------------------------------------


def test_save_refuses_a_float_model(tmp_path: Path) -> None:
    fails("not quantized by sq_cpu", save, tiny_llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_class_that_load_could_not_find(
    quantized_llama: Any, tmp_path: Path
) -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = copy.deepcopy(quantized_llama)
    model.__class__ = Mine
    fails("Mine is not a class of transformers", save, model, tmp_path / "out")


def test_save_replaces_its_own_checkpoint(quantized_llama: Any, tmp_path: Path) -> None:
    folder = save(quantized_llama, tmp_path / "out", max_shard_size=6000)
    save(quantized_llama, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_save_into_an_empty_folder_and_through_a_link(quantized_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(quantized_llama, tmp_path / "link")
    save(quantized_llama, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_model(load(tmp_path / "real"), quantized_llama, logits)


def test_save_makes_parents(quantized_llama: Any, tmp_path: Path) -> None:
    save(quantized_llama, tmp_path / "a" / "b" / "out")
    load(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("name", ["notes.txt", "model-00001-of-00002.safetensors"])
def test_save_keeps_a_folder_that_holds_other_files(folder: Path, name: str) -> None:
    (folder / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fails(f"holds {name}", save, load(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_keeps_a_float_checkpoint(quantized_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    before = {path.name: path.read_bytes() for path in (tmp_path / "float").iterdir()}
    fails("not an sq_cpu checkpoint", save, quantized_llama, tmp_path / "float")
    assert {p.name: p.read_bytes() for p in (tmp_path / "float").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_save_refuses_a_file_and_a_parent_that_is_one(quantized_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    fails("is a file", save, quantized_llama, tmp_path / "file")
    fails("cannot write checkpoint", save, quantized_llama, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_save_into_an_unwritable_folder(quantized_llama: Any) -> None:
    # Nobody can make a folder there, not even root.
    fails("cannot write checkpoint", save, quantized_llama, Path("/proc/sq_cpu/out"))


def fail_at(call: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function`, which raises `error` at its n-th call."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("over", ["nothing", "new parents", "a checkpoint"])
def test_full_disk_leaves_nothing_behind(
    quantized_llama: Any, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a" / "b" / "out" if over == "new parents" else tmp_path / "out"
    if over == "a checkpoint":
        save(quantized_llama, target)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", fail_at(2, full, save_file))
    fails("No space left on device", save, quantized_llama, target, max_shard_size=6000)

    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_interruption_leaves_nothing_behind(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", fail_at(1, KeyboardInterrupt(), save_file))
    with pytest.raises(KeyboardInterrupt):
        save(quantized_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_fills_an_empty_folder_in_place(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    save(quantized_llama, ".")
    assert tmp_path.stat().st_ino == inode
    assert_same_model(load("."), quantized_llama, logits)
    # What is there now could only be replaced with the folder.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fails("mount point or the current folder", save, quantized_llama, ".")
    monkeypatch.chdir("/")
    fails("mount point or the current folder", save, quantized_llama, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_fill_leaves_the_folder_empty(
    quantized_llama: Any, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "rename", fail_at(call, full, Path.rename))
    fails("No space left on device", save, quantized_llama, tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_replaces_folders_within_its_own_checkpoint_alone(
    quantized_llama: Any, tmp_path: Path
) -> None:
    class Nested:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "templates").mkdir()
            (folder / "templates" / "chat.jinja").write_text("x")

    folder = save(quantized_llama, tmp_path / "out", Nested())
    save(quantized_llama, folder, Nested())
    load(folder)
    (folder / "templates" / "mine").mkdir()
    fails("holds templates/mine", save, quantized_llama, folder)
    (folder / "templates" / "mine").rmdir()
    (folder / "templates" / "chat.jinja").write_text("y")
    fails("templates/chat.jinja is damaged", load, folder)


def test_failed_move_restores_the_old_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    busy = OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(Path, "rename", fail_at(2, busy, Path.rename))
    fails("resource busy", save, model, folder)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


# --- what load refuses --------------------------------------------------------------------------


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
        (edit(format_version=4), "format_version 4 is newer than 3.*upgrade sq_cpu"),
        (edit(format_version="1"), "format_version is '1'"),
        (edit(files={}), "lists no files"),
        (edit(files={"../model.safetensors": "0"}), "leaves the folder"),
        (edit(files={"other.safetensors": "0"}), "other.safetensors does not exist"),
        (edit(scheme={"activations": "per_row"}), "bad quantization_config.*activations"),
        (lambda c: c["quantization_config"].pop("scheme"), "bad quantization_config.*scheme"),
        (edit(layers=["model.layers.7.mlp"]), "layer model.layers.7.mlp is not a linear"),
        (edit(layers=[["a"]]), "bad quantization_config.*layers is not a list of names"),
        (edit(layers="a"), "bad quantization_config.*layers is not a list of names"),
        (edit(format_version=True), "format_version is True"),
        (edit(companions=[]), "companions is not a table"),
        (edit(companions={"/etc/hostname": "0"}), "leaves the folder"),
        (lambda c: c.update(hidden_size="x"), "config.json: .*cannot build this model.*hidden_s"),
        (lambda c: c.update(num_attention_heads=0), "config.json: .*cannot build this model"),
        (edit(layers=["model.norm"]), "layer model.norm is not a linear of LlamaForCausalLM"),
        (lambda c: c.update(architectures=["Nonesuch"]), "cannot build this model.*Nonesuch"),
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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_load_edited_on_purpose(folder: Path, name: str) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"use_cache": False}))
    fails(f"/{name} is damaged or was edited.*verify=False", load, folder)
    load(folder, verify=False)


def test_load_does_not_mind_the_layout_of_config_json(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    load(folder)


def test_load_bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    fails("cannot load .*generation_config.json", load, folder, verify=False)


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
            rf"tensor {WEIGHT} is int8 \[47, 48\], expected int8 \[48, 48\]",
        ),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].float()}),
            rf"tensor {WEIGHT} is float32 \[48, 48\], expected int8 \[48, 48\]",
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
        (lambda t: t[WEIGHT].fill_(-128), f"/out: layer {Q_PROJ}: "),
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
