"""The models that accuracy is measured on: re-hosted and with outliers planted, functions kept."""

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
import torch
import whisper
import zoo
from rehost import HOSTS, norm_consumers, plant_outliers, rehost
from tiny import logits, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sq_cpu import texts
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import token_windows

LLAMA: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "head_dim": 8}


def relative(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("model_type", HOSTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rehosted_model_computes_the_same(model_type: str, tied: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 300.0}
    llama = tiny_model("llama", rope_parameters=rope, tie_word_embeddings=tied, **LLAMA)
    hosted = rehost(llama, model_type)
    assert hosted.config.model_type == model_type
    # fp32 sums in another order: 2^-24 each, two blocks.
    assert relative(logits(hosted), logits(llama)) < 5e-6


@pytest.mark.parametrize("model_type", HOSTS)
def test_a_rehosted_model_has_weights_of_its_own(model_type: str) -> None:
    llama = tiny_model("llama", **LLAMA)
    before = logits(llama)
    with torch.no_grad():
        for parameter in rehost(llama, model_type).parameters():
            parameter.zero_()
    assert torch.equal(logits(llama), before)


def test_a_model_with_biases_is_not_rehosted() -> None:
    with pytest.raises(SqCpuError, match="without biases"):
        rehost(tiny_model("llama"), "mistral")


def model_to_plant(model_type: str) -> nn.Module:
    if model_type in ("llama", "opt"):
        return tiny_model(model_type)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "opt", "bloom", "gpt2"])
def test_planted_outliers_are_there_and_do_not_move_logits(model_type: str) -> None:
    model = model_to_plant(model_type)
    planted = copy.deepcopy(model)
    consumers = norm_consumers(planted)
    channels = plant_outliers(planted, consumers)
    assert len(consumers) == 4
    assert len(set(channels)) == 4
    # A scaled epsilon or bias would show; products and sums round alike at every exponent.
    assert relative(logits(planted), logits(model)) < 1e-6

    inputs: dict[str, list[Tensor]] = {name: [] for name in consumers}
    for each in (model, planted):
        for norm in consumers:
            each.get_submodule(norm).register_forward_hook(
                lambda _, __, output, norm=norm: inputs[norm].append(output)
            )
        logits(each)
    for before, after in inputs.values():
        ratio = after / before
        others = [i for i in range(ratio.shape[-1]) if i not in channels]
        assert torch.allclose(ratio[..., channels], torch.tensor(64.0), rtol=1e-4)
        assert torch.allclose(ratio[..., others], torch.tensor(1.0), rtol=1e-2)


def little_endian(form: str, *values: Any) -> bytes:
    return struct.pack(f"<{form}", *values)


def named(name: str) -> bytes:
    return little_endian("H", len(name) + 1) + name.encode() + b"\0"


def ctranslate2(arrays: dict[str, np.ndarray[Any, Any]], aliases: dict[str, str]) -> bytes:
    """Write what CTranslate2 does."""
    codes = {"f4": 0, "i1": 1, "i2": 2, "i4": 3, "f2": 4}
    content = little_endian("I", 6) + named("WhisperSpec") + little_endian("II", 3, len(arrays))
    for name, array in arrays.items():
        content += named(name) + little_endian(f"B{array.ndim}I", array.ndim, *array.shape)
        content += little_endian("BI", codes[array.dtype.str[1:]], array.nbytes) + array.tobytes()
    content += little_endian("I", len(aliases))
    return content + b"".join(named(new) + named(old) for new, old in aliases.items())


def test_ctranslate2_arrays_are_read() -> None:
    arrays = {
        "half": np.arange(6, dtype="<f2").reshape(2, 3),
        "scalar": np.array(7, dtype="<i1"),
        "wide": np.array([-1, 2], dtype="<i4"),
    }
    content = ctranslate2(arrays, {"also": "half"})
    found = whisper.read_ctranslate2(content)
    assert list(found) == [*arrays, "also"]
    for name, array in (arrays | {"also": arrays["half"]}).items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda c: little_endian("I", 5) + c[4:], "version 5"), (lambda c: c + b"\0", "ends at")],
)
def test_other_ctranslate2_files_are_refused(
    change: Callable[[bytes], bytes], message: str
) -> None:
    content = ctranslate2({"a": np.zeros(2, "<f4")}, {})
    with pytest.raises(SqCpuError, match=message):
        whisper.read_ctranslate2(change(content))


def test_keys_with_a_bias_are_refused() -> None:
    name = "encoder/layer_0/self_attention/linear_0/bias"
    bias = np.array([1, 1, 0, 0, 1, 1], "<f4")
    state = whisper.to_transformers({name: bias})
    assert sorted(state) == [f"model.encoder.layers.0.self_attn.{x}_proj.bias" for x in "qv"]
    with pytest.raises(SqCpuError, match="k has a bias"):
        whisper.to_transformers({name: np.ones(6, "<f4")})


def test_wav(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 5, dtype="<f4")
    head = little_endian("HHIIHH", 3, 1, 16000, 64000, 4, 32)

    def write(head: bytes) -> Path:
        chunks = [(b"fmt ", head), (b"LIST", b"odd"), (b"data", samples.tobytes())]
        body = b"".join(
            kind + little_endian("I", len(c)) + c + b"\0" * (len(c) % 2) for kind, c in chunks
        )
        (tmp_path / "a.wav").write_bytes(
            b"RIFF" + little_endian("I", len(body) + 4) + b"WAVE" + body
        )
        return tmp_path / "a.wav"

    np.testing.assert_array_equal(whisper.read_wav(write(head)), samples)
    with pytest.raises(SqCpuError, match="mono float"):
        whisper.read_wav(write(little_endian("HHIIHH", 1, 1, 16000, 32000, 2, 16)))


def test_missing_packages_are_named_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "packages" / "one").mkdir(parents=True)
    places = zoo.Places(tmp_path)
    assert zoo.package_folders(places, {"one": "p-one==1"}) == [tmp_path / "packages" / "one"]
    with pytest.raises(SqCpuError, match=r"pip install --no-deps --target .*packages no-such==1$"):
        zoo.package_folders(places, {"no_such_package": "no-such==1"})


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SqCpuError, match=r"no model gpt5; known: smollm2-llama, .*dit-digits"):
        zoo.load("gpt5")


def test_rank_correlation() -> None:
    a = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert zoo.rank_correlation(a, a**3) == pytest.approx(1)
    assert zoo.rank_correlation(a, -a) == pytest.approx(-1)
    assert zoo.rank_correlation(a, a[[0, 1, 3, 2]]) == pytest.approx(0.2)


def test_noise_levels() -> None:
    images = torch.randn(4, 1, 8, 8)
    noisy, level, noise = digits.add_noise(images, torch.Generator().manual_seed(0))
    angle = (level * torch.pi / 2).reshape(-1, 1, 1, 1)
    torch.testing.assert_close((noisy - angle.sin() * noise) / angle.cos(), images)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HOSTS)
def test_smollm2_rehosted_gives_its_logits(
    smollm2: Callable[[], tuple[Any, Any]], model_type: str
) -> None:
    llama, tokenizer = smollm2()
    (ids,) = token_windows(tokenizer, texts.evaluation(), window=128, windows=1)
    with torch.no_grad():
        expected = llama(ids).logits
        assert relative(rehost(llama, model_type)(ids).logits, expected) < 1e-4
