"""Layers whose keys and values are bf16: which they are, in every way that a model runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_fusing import GREEDY, fused, prompt
from test_lowering import quantized
from tiny import tiny_model
from torch import Tensor
from transformers import LlamaConfig

import sq_cpu
from sq_cpu import Int8Cache, Scheduler, SqCpuError
from sq_cpu.inference.fusing import fuse, fused_of
from sq_cpu.inference.kv_kinds import choose_kv, kv_kind, kv_kinds
from sq_cpu.kernels.paged_attention import page_bytes


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_bf16_is_nearer_to_floats_than_int8_with_and_without_a_cache(name: str) -> None:
    model = tiny_model(name)  # in float: int8 linears turn any difference into other codes
    ids = prompt(2, 50)
    exact = logits(model, ids)
    errors = {}
    for kv in ("int8", "bf16"):
        sq_cpu.use_int8_attention(model, kv=kv)
        model.config.use_cache = True
        with_cache = logits(model, ids)
        model.config.use_cache = False
        assert torch.equal(logits(model, ids), with_cache)
        errors[kv] = float((with_cache - exact).norm() / exact.norm())
    assert 0 < errors["bf16"] < errors["int8"]


@torch.no_grad()
def test_a_fused_model_has_the_bits_of_any_cut_and_batch() -> None:
    model = fused("llama", head="int8")
    fuse(model, kv={1: "bf16"})
    ids = prompt(3, 70)
    whole = logits(model, ids)
    fuse(model, kv="int8")
    assert not torch.equal(logits(model, ids), whole)
    fuse(model, kv={1: "bf16"})
    cache = Int8Cache(model)
    assert [layer.kind for layer in cache.layers] == ["int8", "bf16"]
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([1, 30, 39], dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(logits(model, ids[1:2]), whole[1:2])
    # What the pages hold is read back as floats.
    keys = cache.layers[1].keys
    assert keys is not None
    assert keys.shape[2] == 70
    assert torch.equal(keys, keys.bfloat16().float())


@torch.no_grad()
def test_the_scheduler_and_generate_use_them() -> None:
    model = fused("llama", head="int8")
    fuse(model, kv={0: "bf16"})
    decoder = fused_of(model)
    assert decoder is not None
    assert decoder.kv_kinds == ["bf16", "int8"]
    heads, size = decoder.program.cache_shapes[0]
    assert decoder.page_bytes == heads * (page_bytes(size, "bf16") + page_bytes(size, "int8"))
    assert [pages.kind for pages, _ in Scheduler(model, pages=4)._caches] == ["bf16", "int8"]
    ids = prompt(1, 30)
    expected = model.generate(ids, **GREEDY)[0, 30:].tolist()
    made = sq_cpu.generate(model, [ids[0].tolist()], max_new_tokens=20, stop_tokens=[])
    assert made[0] == expected


def test_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    model = quantized("llama")
    sq_cpu.use_int8_attention(model, kv={1: "bf16"})
    sq_cpu.use_int8_attention(model, enabled=False)
    sq_cpu.save(model, tmp_path / "saved")
    loaded = sq_cpu.load(tmp_path / "saved")
    assert kv_kinds(loaded.config, 2) == ["int8", "bf16"]
    fuse(loaded)
    decoder = fused_of(loaded)
    assert decoder is not None
    assert decoder.kv_kinds == ["int8", "bf16"]


def test_an_encoder_decoder_with_one_config_has_them_in_its_decoder(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = prompt(2, 20)
    sq_cpu.use_int8_attention(model, kv="int8")
    in_int8 = logits(model, ids)
    sq_cpu.use_int8_attention(model, kv={2: "bf16"})
    assert kv_kinds(model.config, 3) == ["int8", "int8", "bf16"]
    assert not torch.equal(logits(model, ids), in_int8)
    model.config.save_pretrained(tmp_path)
    assert kv_kinds(transformers.BartConfig.from_pretrained(tmp_path), 3)[2] == "bf16"


def test_a_model_with_a_text_config_keeps_them_there() -> None:
    config = transformers.AutoConfig.for_model("llava")
    choose_kv(config, {1: "bf16"})
    assert kv_kinds(config, 2) == kv_kinds(config.text_config, 2) == ["int8", "bf16"]
    assert "sq_cpu_bf16_kv_layers" not in vars(config)


def test_a_model_is_as_it_was_after_a_kv_that_it_cannot_have() -> None:
    model = quantized("llama")
    attention = model.config._attn_implementation
    for switch in (sq_cpu.use_int8_attention, fuse):
        with pytest.raises(SqCpuError, match="kv names layer 9"):
            switch(model, kv={9: "bf16"})
        assert model.config._attn_implementation == attention
        assert not model._forward_pre_hooks
        assert fused_of(model) is None
        switch(model)
        with pytest.raises(SqCpuError, match="kv is given with enabled=False"):
            switch(model, enabled=False, kv="int8")
        switch(model, enabled=False)
        assert model.config._attn_implementation == attention
        assert fused_of(model) is None


@pytest.mark.parametrize("layer", [1, "1", np.int64(1), torch.tensor(1)])
def test_a_layer_is_any_integer_or_its_digits(layer: Any) -> None:
    config = quantized("llama").config
    choose_kv(config, {layer: "bf16"})
    assert config.sq_cpu_bf16_kv_layers == [1]
    assert type(config.sq_cpu_bf16_kv_layers[0]) is int


def test_refused() -> None:
    config = quantized("llama").config
    for kv, message in (
        ({2: "bf16"}, r"kv names layer 2; the model has 0 .. 1"),
        ({"2": "bf16"}, r"kv names layer '2'"),
        ({"-1": "bf16"}, r"kv names layer '-1'"),
        ({"first": "bf16"}, r"kv names layer 'first'"),
        ({1.0: "bf16"}, r"kv names layer 1\.0"),
        ({True: "bf16"}, r"kv names layer True"),
        ({1: "bf16", "1": "int8"}, r"kv names layer 1 twice"),
        ({1: "fp8"}, r"kv is 'fp8'; it is int8 or bf16"),
        ("bf17", r"kv is 'bf17'"),
    ):
        with pytest.raises(SqCpuError, match=message):
            choose_kv(config, kv)  # type: ignore[arg-type]
    assert kv_kinds(config, 2) == ["int8", "int8"]
    config.sq_cpu_bf16_kv_layers = "all"
    with pytest.raises(SqCpuError, match="it is a list of layers"):
        kv_kind(config, 0)


def without_layers() -> Any:
    """Return a tiny decoder whose config does not say how many layers it has."""

    class Countless(LlamaConfig):
        def __getattribute__(self, name: str) -> Any:
            if name == "num_hidden_layers":
                raise AttributeError(name)
            return super().__getattribute__(name)

    model = tiny_model("llama")
    model.config.__class__ = Countless
    return model


def test_a_config_without_a_number_of_layers() -> None:
    model, ids = without_layers(), prompt(1, 8)
    sq_cpu.use_int8_attention(model)  # which needs none
    wants: list[Callable[[], object]] = [
        *(partial(sq_cpu.use_int8_attention, model, kv=kv) for kv in ("bf16", {0: "bf16"})),
        partial(sq_cpu.measure_kv, model, [ids]),
        partial(sq_cpu.Int8Cache, model),
        partial(sq_cpu.make_prefix, model, [1]),
        partial(sq_cpu.calibrate, model, [ids], prefix=[1]),
    ]
    for want in wants:
        with pytest.raises(SqCpuError, match=r"Countless has no num_hidden_layers: .* leave them"):
            want()
    with pytest.raises(SqCpuError, match="SamConfig has no num_hidden_layers"):
        sq_cpu.Int8Cache(transformers.SamConfig())
