"""`attn_implementation="sq_cpu"`: what it computes in int8, what in floats, and that it says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import CONFIGS, inputs, tiny_model
from torch import Tensor, nn
from transformers import masking_utils

import sq_cpu
from sq_cpu import Int8Cache, SqCpuError
from sq_cpu.inference import attention as attention_module
from sq_cpu.inference.attention import attention
from sq_cpu.inference.lazy import LazyTensor
from sq_cpu.inference.masks import MaskPattern, make_mask, pattern_of

# The families of decoders, and variants.
# fmt: off
DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "mixtral", "olmoe", "qwen2_moe",
    "qwen3_moe", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "phi", "phi-relu", "phi3", "glm",
    "glm4", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm", "stablelm-parallel", "opt",
    "opt-350m", "gpt2", "gpt_neox", "gpt_neox-sequential",
]
# What these cache is not yet keys and values.
LATENT = ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"]
OWN_CODE = ["bloom", "bloom-postnorm", "gptj", "falcon", "falcon-rw", "falcon-new", "mpt"]
# fmt: on


def seen_by(pattern: MaskPattern, batch: int) -> Tensor:
    """Return which keys each position sees, bool [batch, 1, new, total]."""
    key = torch.arange(pattern.total)
    query = key[pattern.total - pattern.new :, None]
    seen = key <= query if pattern.causal else torch.ones(pattern.new, pattern.total).bool()
    if pattern.window:
        seen = seen & (key > query - pattern.window)
    begins = torch.tensor(pattern.begins or [0] * batch)[:, None, None, None]
    ends = torch.tensor(pattern.ends or [pattern.total] * batch)[:, None, None, None]
    return seen & (key >= begins) & (key < ends)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the calls that were computed in int8 and in floats; check the former."""
    counts = {"int8": 0, "floats": 0}
    over_pages, in_floats = attention_module._over_pages, attention_module._in_floats

    def int8(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, pattern: Any, options: Any
    ) -> Tensor | None:
        y = over_pages(module, q, k, v, pattern, options)
        if y is not None:
            counts["int8"] += 1
            seen = seen_by(pattern, len(q))
            added = torch.zeros(seen.shape).masked_fill(~seen, -1e30)
            exact, _ = in_floats(q, k, v, added, options.scale, options.softcap, options.sinks, 0.0)
            # k and v are the same codes where they come of a cache. Rounding q, p, and k and v of a
            # call without one, to 8 bits leaves about 1/255 of a value; another mask, all of it.
            tokens = seen.any(dim=3)[:, 0]
            error = (y - exact)[tokens].square().mean().sqrt()
            assert error < 0.01 * (v + 0).square().mean().sqrt()
        return y

    def floats(*arguments: Any) -> tuple[Tensor, Tensor]:
        counts["floats"] += 1
        return in_floats(*arguments)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "_over_pages", int8)
        patch.setattr(attention_module, "_in_floats", floats)
        yield counts


def left_padded(ids: Tensor, count: int) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@contextmanager
def warnings_of(name: str) -> Iterator[None]:
    """Expect the warning that a model of this type gives, and no other."""
    reasons = {"gemma3": "not causal or sliding"}
    reasons |= dict.fromkeys(LATENT, "a past that does not come from an int8 cache")
    if name == "t5":  # in some releases its mask is a tensor, in others a bias beside it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    elif name in reasons:
        with pytest.warns(UserWarning, match=reasons[name]):
            yield
    else:
        yield


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    ids = inputs(name)[0]["input_ids"].clamp(min=3)
    x = left_padded(ids, 5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**x).logits
    model.set_attn_implementation("sq_cpu")
    with counted(monkeypatch) as counts, warnings_of(name):
        cache = Int8Cache(model)
        mask = x["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        pieces = [
            model(
                x["input_ids"][:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                **({} if name.startswith("opt") else {"position_ids": positions[:, begin:end]}),
            ).logits
            for begin, end in ((0, 3), (3, 10), (10, 11), (11, 16))
        ]
    in_floats = 3 if name in LATENT else 0
    layers = model.config.num_hidden_layers
    assert counts == {"int8": (4 - in_floats) * layers, "floats": in_floats * layers}
    y = torch.cat(pieces, dim=1)
    seen = mask.bool()
    # eager has no positions given: its own are the same for tokens after padding, but for a shift
    # that rotary embeddings do not see, and that models with learned positions do.
    if name in ("gpt2",):
        with torch.no_grad():
            model.set_attn_implementation("eager")
            expected = model(**x, position_ids=positions).logits
    # The layers' errors above, of a hundredth, add up through two blocks.
    error = (y - expected)[seen].square().mean().sqrt()
    assert error < 0.03 * expected[seen].std()


@pytest.mark.parametrize("name", OWN_CODE)
def test_models_with_attention_of_their_own_read_the_cache(name: str) -> None:
    model = tiny_model(name)
    ids = inputs(name)[0]["input_ids"]
    with pytest.raises(SqCpuError, match="computes attention in code of its own"):
        sq_cpu.use_int8_attention(model)
    with torch.no_grad():
        expected = model(ids).logits
        cache = Int8Cache(model)
        y = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(9, 1)], 1)
    assert 0 < (y - expected).square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "clip", "whisper", "t5", "gemma3"])
def test_other_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_model(name), inputs(name)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**x)
    model.set_attn_implementation("sq_cpu")
    with counted(monkeypatch) as counts, warnings_of(name):
        found = model(**x, **({"use_cache": False} if name in ("t5", "whisper") else {}))
    key = "logits_per_image" if name == "clip" else "logits"
    assert (found[key] - expected[key]).square().mean().sqrt() < 0.03 * expected[key].std()
    assert (counts["int8"] == 0) is (name == "t5")  # its mask has the position bias in it


# ---------------------------------------------------------------------------------------- one call


def call(batch: int, new: int, heads: int = 4, kv_heads: int = 2, size: int = 16) -> list[Tensor]:
    shapes = [(batch, n, new, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape) for shape in shapes]


def mask_of(attention_mask: Tensor, new: int, **options: Any) -> Tensor:
    batch, total = attention_mask.shape
    return make_mask(
        batch, new, total, total - new, 0, attention_mask=attention_mask.bool(), **options
    )


def layer() -> nn.Module:
    module = nn.Module().eval()
    module.is_causal = True  # type: ignore[assignment]
    return module


def run(cache: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return attention(layer(), q, *cache.update(k, v, 0), mask, **options)[0]


@pytest.fixture
def config() -> Any:
    return tiny_model("llama").config


def test_padded_and_chunked_prompts_have_the_bits_of_each_alone(config: Any) -> None:
    torch.manual_seed(0)
    lengths, total = [300, 64, 1, 129], 300
    q, k, v = call(4, total)
    mask = torch.zeros(4, total, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, total - length :] = 1
    with torch.no_grad():
        alone = [
            run(Int8Cache(config), *(x[i : i + 1, :, total - n :] for x in (q, k, v)), None)[0]
            for i, n in enumerate(lengths)
        ]
        whole = run(Int8Cache(config), q, k, v, mask_of(mask, total))
        cache = Int8Cache(config)
        pieces = []
        for begin, end in ((0, 1), (1, 130), (130, 171), (171, 299), (299, 300)):
            part = (x[:, :, begin:end] for x in (q, k, v))
            pieces.append(run(cache, *part, mask_of(mask[:, :end], end - begin)))
        without = attention(layer(), q, k, v, mask_of(mask, total))[0]
    for i, length in enumerate(lengths):
        assert torch.equal(whole[i, total - length :], alone[i])
        assert not whole[i, : total - length].any()
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(without, whole)


def test_beams_crops_and_selections_keep_the_bits(config: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        q, k, v = call(3, 100)
        more = call(3, 9)
        cache, plain = Int8Cache(config), Int8Cache(config)
        run(cache, q, k, v, None)
        run(cache, *more, None)
        cache.crop(-9)
        order = torch.tensor([2, 2, 0])
        cache.reorder_cache(order)
        found = run(cache, *more, None)
        run(plain, *(x[order] for x in (q, k, v)), None)
        assert torch.equal(found, run(plain, *more, None))


@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 256])
def test_head_sizes_and_groups(config: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    mask = torch.ones(3, 80)
    mask[0, :30] = 0
    with counted(monkeypatch) as counts:
        for kv_heads, group in ((1, 1), (1, 8), (2, 3), (4, 1)):
            cache = Int8Cache(config)
            heads = kv_heads * group
            run(cache, *call(3, 70, heads, kv_heads, size), mask_of(mask[:, :70], 70))
            run(cache, *call(3, 10, heads, kv_heads, size), mask_of(mask, 10))
    assert counts == {"int8": 8, "floats": 0}


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("new", [1, 5])
def test_options(config: Any, window: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kind: dict[str, Any] = {}
    if window:
        function = masking_utils.sliding_window_causal_mask_function(window)
        kind = {"mask_function": function, "local_size": window}
    with counted(monkeypatch) as counts:
        cache = Int8Cache(config)
        mask = torch.ones(2, 20 + new)
        run(cache, *call(2, 20), mask_of(mask[:, :20], 20, **kind))
        options = {"softcap": 2.0, "s_aux": torch.linspace(-1, 1, 4), "scaling": 0.4}
        built = mask_of(mask, new, **kind)
        run(cache, *call(2, new), built, **options)
    assert counts == {"int8": 2, "floats": 0}
    pattern = pattern_of(built)
    assert pattern is not None
    assert pattern.window == window


def test_a_chunk_is_no_window() -> None:
    def pattern(total: int, new: int, *left_padding: int) -> MaskPattern | None:
        chunks = masking_utils.chunked_causal_mask_function(8, torch.tensor(left_padding))
        return pattern_of(mask_of(torch.ones(2, total), new, mask_function=chunks, local_size=8))

    assert pattern(8, 8, 0, 0) is not None  # the first chunk is all that there is
    assert pattern(24, 1, 0, 0) is not None  # the last of a chunk sees as many
    for new in range(2, 24):
        assert pattern(24, new, 0, 0) is None
        assert pattern(24, new, 0, 3) is None
    assert pattern(24, 1, 0, 3) is None


@pytest.mark.parametrize("kind", ["hole", "custom", "or_mask"])
def test_other_masks_are_exact(config: Any, kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 30)
    mask[0, :4] = 0
    built: Tensor
    if kind == "hole":
        mask[1, 10:12] = 0
        built = mask_of(mask, 30)
    elif kind == "or_mask":
        built = mask_of(mask, 30, allow_is_causal_skip=False)
    else:
        built = mask_of(mask, 30) + 0
    assert not isinstance(built, LazyTensor)
    q, k, v = call(2, 30)
    cache = Int8Cache(config)
    with torch.no_grad(), pytest.warns(UserWarning, match="computed in floats: a mask that is not"):
        y = run(cache, q, k, v, built)
    k, v = cache.layers[0].keys, cache.layers[0].values
    group = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = nn.functional.scaled_dot_product_attention(q, *group, attn_mask=built)
    # 30 products and sums of values of about 1
    assert (y - expected.transpose(1, 2))[mask.bool()].abs().max() < 64 * torch.finfo().eps


def test_a_mask_that_changes_what_was_padding(config: Any) -> None:
    cache, mask = Int8Cache(config), torch.ones(2, 11)
    mask[0, :4] = 0
    with torch.no_grad():
        run(cache, *call(2, 10), mask_of(mask[:, :10], 10))
        with pytest.warns(UserWarning, match="shows or hides"):
            run(cache, *call(2, 1), mask_of(torch.ones(2, 11), 1))


def test_right_padding_is_not_seen(config: Any) -> None:
    torch.manual_seed(0)
    q, k, v = call(2, 20)
    mask = torch.ones(2, 20)
    mask[1, 12:] = 0
    with torch.no_grad():
        y = run(Int8Cache(config), q, k, v, mask_of(mask, 20))
        alone = run(Int8Cache(config), *(x[1:, :, :12] for x in (q, k, v)), None)
        assert torch.equal(y[1:, :12], alone)
        bidirectional = mask_of(
            mask,
            20,
            mask_function=masking_utils.bidirectional_mask_function,
            allow_is_bidirectional_skip=True,
        )
        y = attention(layer(), q, k, v, bidirectional)[0]
        alone = attention(layer(), *(x[1:, :, :12] for x in (q, k, v)), None, is_causal=False)[0]
        assert torch.equal(y[1:, :12], alone)


def test_gradients_and_weights_are_of_floats(config: Any) -> None:
    q, k, v = (x.requires_grad_() for x in call(1, 6))
    y, weights = attention(layer(), q, k, v, None)
    assert weights is None
    group = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    expected = nn.functional.scaled_dot_product_attention(q, *group, is_causal=True)
    assert torch.allclose(y, expected.transpose(1, 2), atol=1e-6)
    y.sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        _, weights = attention(layer(), q, k, v, None, output_attentions=True)
    assert weights is not None
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 6))


def test_refused() -> None:
    with pytest.raises(SqCpuError, match="no sparse"):
        attention(layer(), *call(1, 3), None, indices=torch.zeros(1))
    with pytest.raises(SqCpuError, match="Linear is no model of transformers"):
        sq_cpu.use_int8_attention(nn.Linear(1, 1))


def test_all_decoders_are_tested() -> None:
    others = {"bert", "roberta", "vit", "clip", "whisper", "t5", "t5-gated", "gemma3"}
    others |= {"falcon-new_one_norm", "mpt-clipped"}  # variants
    assert set(CONFIGS) == {*DECODERS, *OWN_CODE, *others}
