"""`save` proves that `load` rebuilds the model: what cannot be is refused, by name, at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sameness import assert_same_model
from tiny import batches, inputs, tiny_model
from tiny_checkpoints import fails, logits, quantized, tiny_llama
from torch import nn

import sq_cpu
from sq_cpu.checkpoint.likeness import _compare, _UnlikeError
from sq_cpu.nn.linear import QuantLinear

_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_ENCODER = {
    "vocab_size": 64,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
# The head's weight is the embedding's; some tie more to it, ALBERT's blocks are one module.
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ),
    "bart-causal": ("BartForCausalLM", _SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", _SEQ2SEQ),
    "marian": ("MarianMTModel", _SEQ2SEQ),
    "m2m_100": ("M2M100ForConditionalGeneration", _SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", _SEQ2SEQ),
    "blenderbot": ("BlenderbotForConditionalGeneration", _SEQ2SEQ),
    "albert": ("AlbertForMaskedLM", _ENCODER),
    "electra": ("ElectraForMaskedLM", _ENCODER),
    "umt5": (
        "UMT5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "decoder_start_token_id": 0},
    ),
}


def with_head(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a model whose linears are all int8, and inputs of it."""
    if name in TIED:
        torch.manual_seed(0)
        model_class = getattr(transformers, TIED[name][0])
        model = model_class(model_class.config_class(**TIED[name][1])).eval()
        data = [{"input_ids": ids} for ids in batches()]
        if model.config.is_encoder_decoder and "causal" not in name:
            data = [one | {"decoder_input_ids": one["input_ids"][:, :9]} for one in data]
    else:
        model, data = tiny_model(name), inputs(name)
    assert model.all_tied_weights_keys
    calibration = sq_cpu.calibrate(model, data, ignore=(), progress=False)
    sq_cpu.quantize(model, calibration, scheme=sq_cpu.Scheme(ignore=()), progress=False)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    return model, data[0]


@pytest.mark.parametrize("name", [*TIED, "bert", "t5", "whisper", "opt", "gpt2"])
def test_a_quantized_head_that_was_tied(name: str, tmp_path: Path) -> None:
    model, data = with_head(name)
    folder = sq_cpu.save(model, tmp_path / "out")
    stored = load_file(folder / "model.safetensors").values()
    embedding = model.get_input_embeddings().weight
    assert sum(embedding.equal(tensor) for tensor in stored) == 1
    for loaded in (sq_cpu.load(folder), type(model).from_pretrained(folder)):
        assert_same_model(loaded, model, lambda model: model(**data).logits)
        assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_head_in_float_beside_quantized_linears_stays_tied(tmp_path: Path) -> None:
    model = quantized(tiny_llama())
    loaded: Any = sq_cpu.load(sq_cpu.save(model, tmp_path / "out"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("ignore", [(), ("up_proj",), ("layers.0.mlp.up_proj",)], ids=str)
def test_linears_that_share_a_weight(ignore: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    quantized(model, sq_cpu.Scheme.of("O1", ignore=("lm_head", *ignore)))
    folder = sq_cpu.save(model, tmp_path / "out")
    assert_same_model(sq_cpu.load(folder), model, logits)


# --- changed structures ---------------------------------------------------------------------------


def first_of(model: Any) -> Any:
    return model.model.layers[0]


def one_layer_less(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def one_layer_twice(model: Any) -> None:
    model.model.layers[1] = first_of(model)


def wrap(model: Any) -> None:
    first_of(model).mlp = nn.Sequential(first_of(model).mlp)


def new_forward(model: Any) -> None:
    mlp = first_of(model).mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 2


def longer_embedding(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight = nn.Parameter(torch.randn(101, 48))


def set_attribute(model: Any) -> None:
    first_of(model).self_attn.scaling = 0.5


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "layers dropped": (one_layer_less, r"it has no model\.layers\.1, a fresh one has"),
    "a shared module": (one_layer_twice, r"layers\.1 is the module model\.layers\.0, in a fresh"),
    "a module replaced": (
        lambda m: setattr(first_of(m).mlp, "act_fn", nn.ReLU()),
        r"mlp\.act_fn is a ReLU, in a fresh one a SiLU",
    ),
    "a module wrapped": (wrap, r"layers\.0\.mlp is a Sequential, in a fresh one a LlamaMLP"),
    "a module added": (
        lambda m: first_of(m).add_module("extra", nn.LayerNorm(48)),
        r"it has model\.layers\.0\.extra, a fresh one has not",
    ),
    "a forward replaced": (new_forward, r"the forward of model\.layers\.0\.mlp was replaced"),
    "an attribute": (set_attribute, r"self_attn: scaling is 0\.5, in a fresh one 0\.28"),
    "another shape": (longer_embedding, r"embed_tokens\.weight is float32 \[101, 48\], expected"),
    "a parameter added": (
        lambda m: m.model.norm.register_parameter("shift", nn.Parameter(torch.ones(48))),
        r"tensor model\.norm\.shift not expected",
    ),
    "a parameter dropped": (
        lambda m: setattr(m.model.norm, "weight", None),
        r"tensor model\.norm\.weight missing",
    ),
    "a buffer added": (
        lambda m: m.model.norm.register_buffer("shift", torch.ones(48), persistent=False),
        r"the buffer model\.norm\.shift is not in a fresh one",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_structure_that_the_config_does_not_describe(name: str, tmp_path: Path) -> None:
    change, match = CHANGES[name]
    model = sq_cpu.quantize(tiny_llama(), smooth=False)
    if name in ("layers dropped", "a shared module", "a module wrapped"):
        model = tiny_llama()
        change(model)
        sq_cpu.quantize(model, smooth=False)
    else:
        change(model)
    fails(
        f"load could not rebuild this LlamaForCausalLM: .*{match}",
        sq_cpu.save,
        model,
        tmp_path / "o",
    )
    assert not list(tmp_path.iterdir())


def test_layers_dropped_after_quantizing(tmp_path: Path) -> None:
    model: Any = sq_cpu.quantize(tiny_llama(), smooth=False)
    one_layer_less(model)
    fails(
        r"model\.layers\.1\.\S+ was quantized, but the model has no", sq_cpu.save, model, tmp_path
    )


def test_a_layer_that_the_record_does_not_describe(tmp_path: Path) -> None:
    model: Any = sq_cpu.quantize(tiny_llama(), smooth=False)
    layer = first_of(model).mlp.up_proj
    other = copy.deepcopy(model)
    first_of(other).mlp.up_proj.scheme = sq_cpu.Scheme.of("O2")
    fails("up_proj is not the layer that the model's record", sq_cpu.save, other, tmp_path)
    model.lm_head = copy.deepcopy(layer)
    fails("lm_head is int8, but not in the model's record", sq_cpu.save, model, tmp_path)


def attention_of(model: Any) -> Any:
    return model.model.layers[0].self_attn


ATTRIBUTES: dict[str, tuple[Callable[[Any], object], str]] = {
    "None before": (
        lambda attention: setattr(attention, "sliding_window", 2),
        "sliding_window is 2, in a fresh one None",
    ),
    "None now": (
        lambda attention: setattr(attention, "layer_idx", None),
        "layer_idx is None, in a fresh one 0",
    ),
    "another kind": (
        lambda attention: setattr(attention, "scaling", torch.float16),
        r"scaling is torch\.float16, in a fresh one 0\.\d+",
    ),
    "in it alone": (
        lambda attention: setattr(attention, "logit_cap", (1.0, None)),
        r"logit_cap is \[1\.0, None\], in a fresh one absent",
    ),
    "a table": (
        lambda attention: setattr(attention, "settings", {"a": [1]}),
        r"settings is \{'a': \[1\]\}, in a fresh one absent",
    ),
    "in a fresh one alone": (
        lambda attention: delattr(attention, "is_causal"),
        "is_causal is absent, in a fresh one True",
    ),
    "a function of the class": (
        lambda attention: setattr(attention, "extra_repr", torch.nn.functional.relu),
        r"extra_repr is 'torch\.nn\.functional\.relu', in a fresh one '\S+\.extra_repr'",
    ),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_plain_attributes_that_the_config_does_not_describe(name: str, tmp_path: Path) -> None:
    change, match = ATTRIBUTES[name]
    model = sq_cpu.quantize(tiny_model("qwen2"), smooth=False)
    change(attention_of(model))
    fails(f"layers.0.self_attn: {match}; have its config", sq_cpu.save, model, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_functions_are_compared_by_name(tmp_path: Path) -> None:
    model = sq_cpu.quantize(tiny_model("bert"), smooth=False)
    layer = model.bert.encoder.layer[0]
    original = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: original(x) * 2
    fails("feed_forward_chunk is '.*<lambda>'", sq_cpu.save, model, tmp_path / "o")
    layer.feed_forward_chunk = original  # the class's own method, bound
    sq_cpu.save(model, tmp_path / "o")


class Noting(nn.Module):
    """Notes its input's length, and has a switch that its forward turns."""

    def __init__(self) -> None:
        super().__init__()
        self.length: int | None = None
        self.is_turned = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.length, self.dtype = len(x), x.dtype
        return x


def test_what_a_forward_notes_for_itself_is_not_compared() -> None:
    fresh, used = Noting(), Noting()
    used(torch.ones(3))
    _compare("it", used, fresh)
    used.is_turned = True
    with pytest.raises(_UnlikeError, match="is_turned is True, in a fresh one False"):
        _compare("it", used, fresh)


def dropped(model: Any) -> None:
    one_layer_less(model)
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize("change", [dropped, lambda m: m.resize_token_embeddings(131)])
def test_a_structure_that_the_config_does_describe(
    change: Callable[[Any], object], tmp_path: Path
) -> None:
    model = tiny_llama()
    change(model)
    model = quantized(model)
    folder = sq_cpu.save(model, tmp_path / "out")
    for loaded in (sq_cpu.load(folder), type(model).from_pretrained(folder)):
        assert_same_model(loaded, model, logits)


# --- buffers that no state_dict has ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj", "falcon", "gemma2", "phi"])
def test_buffers_that_load_would_compute_otherwise_are_stored(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.bfloat16)  # the cast rounds the rotary frequencies
    sq_cpu.quantize(model, smooth=False)
    folder = sq_cpu.save(model, tmp_path / "out")
    buffers = {k: v for k, v in model.named_buffers() if not k.endswith(".packed")}
    assert buffers
    for loaded in (sq_cpu.load(folder), type(model).from_pretrained(folder)):
        found = dict(loaded.named_buffers())
        for key, buffer in buffers.items():
            assert found[key].dtype == buffer.dtype
            assert torch.equal(found[key], buffer)
        assert_same_model(loaded, model, lambda model: model(batches(1)[0]).logits)
    again = sq_cpu.save(sq_cpu.load(folder), tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
