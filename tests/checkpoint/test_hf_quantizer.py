"""`from_pretrained` gives the very model that `load` gives, or an error of one line."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import assert_same_model, assert_to_rounding, digests, logits_of_a_fresh_process
from tiny import batches, change_config, logits, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.nn.linear import QuantLinear


def quantized(model: Any, scheme: str | Scheme = "O3") -> Any:
    ignore = Scheme.of(scheme).ignore
    calibration = sq_cpu.calibrate(model, batches(), ignore=ignore, progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized(tiny_model("llama", tie_word_embeddings=True))
    model.generation_config.max_new_tokens = 7
    return sq_cpu.save(model, tmp_path_factory.mktemp("template") / "out")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """Give a checkpoint that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "out"))


def fails(match: str, source: Any, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> None:
    with pytest.raises(SqCpuError, match=match) as caught:
        auto.from_pretrained(source, **kwargs)
    assert "\n" not in str(caught.value)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert_same_model(found, expected, logits)
    assert found.dtype == found.config.dtype == expected.dtype
    assert found.sq_cpu_config == expected.sq_cpu_config
    assert found.all_tied_weights_keys == expected.all_tied_weights_keys
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not any(module.training for module in found.modules())
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name


# --- the same model -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_equals_load(model_type: str, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(tiny_model(model_type, dtype=dtype), scheme)
    folder = sq_cpu.save(model, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(found, sq_cpu.load(folder))
    if (
        dtype == torch.float32
    ):  # else tiny_model rounded the rotary frequencies, which load does not
        assert_same_model(found, model, logits)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_is_copied_and_pickled(folder: Path, again: Callable[[Any], Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(again(model), model, logits)


def test_fresh_process(tmp_path: Path) -> None:
    models = {
        "llama": quantized(tiny_model("llama"), "O3"),
        "opt": quantized(tiny_model("opt", dtype=torch.bfloat16), "O1"),
    }
    for name, model in models.items():
        sq_cpu.save(model, tmp_path / name)
    found = logits_of_a_fresh_process(models, batches(1)[0], tmp_path, loader="from_pretrained")
    for name, model in models.items():
        assert_to_rounding(found[name].float(), logits(model), model.dtype)


def test_registers_after_transformers_is_imported(folder: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import sq_cpu
AutoModelForCausalLM.from_pretrained(sys.argv[1]).sq_cpu_config
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script, folder], check=True)


def test_real_model(smollm2: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    model, tokenizer = smollm2()
    texts = [tokenizer("The weather today is", return_tensors="pt").input_ids]
    calibration = sq_cpu.calibrate(model, texts, progress=False)
    sq_cpu.quantize(model, calibration, scheme="O3", progress=False)
    found = AutoModelForCausalLM.from_pretrained(sq_cpu.save(model, tmp_path / "out"))
    assert_same_model(found, model)
    # Tokens: rounding moves no logit past another.
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(found.generate(texts[0], **options), model.generate(texts[0], **options))


def test_shards(tmp_path: Path) -> None:
    folder = sq_cpu.save(quantized(tiny_model("llama")), tmp_path / "out", max_shard_size=6000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same(AutoModelForCausalLM.from_pretrained(folder), sq_cpu.load(folder))


def test_packed_weights_are_the_only_copy(folder: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder)
    layers = {name for name, m in found.named_modules() if isinstance(m, QuantLinear)}
    assert layers == set(found.sq_cpu_config.layers)
    tensors = [*found.parameters(), *found.buffers()]
    assert not any(tensor.dtype == torch.int8 for tensor in tensors)
    assert not any(name.rpartition(".")[0] in layers for name, _ in found.named_parameters())
    assert "state_dict" not in vars(found)


def test_tied_head(folder: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), Scheme(ignore=()))
    folder = sq_cpu.save(model, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(found.lm_head, QuantLinear)
    assert_same(found, sq_cpu.load(folder))


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype(folder: Path, keyword: str, dtype: torch.dtype) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder, **{keyword: dtype})
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    assert_same(found, sq_cpu.load(folder, dtype=dtype))


def test_mixed_dtypes_stay_as_stored(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.lm_head.float()
    model = sq_cpu.quantize(model, scheme="O1", smooth=False, progress=False)
    folder = sq_cpu.save(model, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.lm_head.weight.dtype == torch.float32
    assert found.model.embed_tokens.weight.dtype == torch.bfloat16


def test_options_of_the_caller(folder: Path) -> None:
    found, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", use_cache=False, output_loading_info=True
    )
    assert found.config._attn_implementation == "eager"
    assert not found.config.use_cache
    assert not any(report.values())
    assert found.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_device_map(folder: Path, device_map: Any) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert_same(found, sq_cpu.load(folder))


def test_generates(folder: Path) -> None:
    ids = batches(1)[0][:1]
    found, expected = AutoModelForCausalLM.from_pretrained(folder), sq_cpu.load(folder)
    assert digests(found) == digests(expected)
    # The mask: generate would take the token 0 for padding.
    tokens = found.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)
    made = tokens[:, ids.shape[1] :]
    assert made.numel()
    # The greedy choices of the other: of two scores that are equal to rounding, either.
    with torch.no_grad():
        scores = expected(tokens).logits[:, ids.shape[1] - 1 : -1]
    chosen = scores.gather(-1, made[..., None])[..., 0]
    assert_to_rounding(chosen, scores.amax(-1), expected.dtype)


def test_copies(folder: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(copy.deepcopy(found), found, logits)


# --- saving it again ----------------------------------------------------------------------------


def test_save_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = sq_cpu.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
    assert {p.name for p in again.iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cuda", 0, {"": "meta"}, {"model": "cpu", "": "disk"}])
def test_other_devices(folder: Path, device_map: Any) -> None:
    fails("runs on the CPU only", folder, device_map=device_map)


def test_other_quantization(folder: Path) -> None:
    # transformers compares the two before it asks us.
    with pytest.raises(ValueError, match="SqCpuConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_tensor_parallel(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.distributed_config = {"tp_size": 2}
    fails("whole by one process", folder, config=config)


def test_dtype_that_the_layers_lack(folder: Path) -> None:
    fails("dtype is torch.float64", folder, dtype=torch.float64)


def test_without_a_folder(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    fails("needs the folder", None, auto=LlamaForCausalLM, config=config, state_dict={})


def test_other_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.mine.safetensors")
    fails("model.safetensors does not exist", folder, variant="mine")
    shutil.copy(folder / "model.mine.safetensors", folder / "model.safetensors")
    fails(r"model\.mine\.safetensors is not a file of this checkpoint", folder, variant="mine")


def edit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["quantization_config"].update(changes)


def without_a_layer(content: dict[str, Any]) -> None:
    settings = content["quantization_config"]
    del settings["misfits"][settings["layers"].pop(0)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(format_version=10), "format_version 10 is newer than 9.*upgrade sq_cpu"),
        (edit(format_version="1"), "format_version is '1'"),
        (edit(files={}), "lists no files"),
        (edit(files={"other.safetensors": "0"}), "other.safetensors does not exist"),
        (edit(scheme={"activations": "per_row"}), "bad quantization_config.*activations"),
        (lambda c: c["quantization_config"].pop("layers"), "bad quantization_config.*layers"),
        (
            edit(layers=["model.norm"], hadamard={}, misfits={}),
            "layer model.norm is not a linear of LlamaForCausalLM",
        ),
        (without_a_layer, "tensor.* not expected"),
        (lambda c: c.update(num_hidden_layers=3), r"tensors \(model.layers.2.*missing"),
        (lambda c: c.update(architectures=None), "holds a unknown model"),
    ],
)
def test_bad_config(folder: Path, change: Callable[..., object], match: str) -> None:
    change_config(folder, change)
    fails(match, folder)


def test_bit_flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    fails("model.safetensors is damaged", folder)
