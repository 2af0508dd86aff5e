"""A prefix in float of quantized models, fused and in a scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefixes import BOS, GREEDY, off, padded, spoil, texts
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache

import sq_cpu
from sq_cpu import Request, Scheduler, SqCpuError
from sq_cpu.inference.prefix import make_prefix, prefix_of, use_prefix

FUSED = ["llama", "gemma3_text", "mixtral", "opt", "gpt2", "bloom"]


def quantized(name: str, scheme: str = "O3", prefix: tuple[int, ...] = (BOS,), **more: Any) -> Any:
    model = tiny_model(name, **more)
    batches = [texts(prefix), texts(prefix, 2, 20)]
    calibration = sq_cpu.calibrate(model, batches, prefix=prefix, progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@torch.no_grad()
def test_a_quantized_model_has_it(scheme: str) -> None:
    model = tiny_model("llama")
    wanted = model(texts()).logits
    prefix = make_prefix(model, [BOS])
    model = quantized("llama", scheme)
    assert model.sq_cpu_config.prefix == (BOS,)
    found = prefix_of(model)
    assert found is not None
    # A fold changes values: those of the folded model are kept.
    folded = [group for group in model.sq_cpu_config.plan.groups if "v_proj" in group.name]
    assert torch.equal(found.values[0], prefix.values[0]) == (not folded)
    made = model(texts()).logits
    assert off(made, wanted) < 0.05
    assert torch.equal(spoil(model)(texts()).logits[..., 3:], made[..., 3:])


@torch.no_grad()
def test_a_fold_of_values() -> None:
    model = tiny_model("opt")
    before = make_prefix(model, [BOS])
    calibration = sq_cpu.calibrate(model, [texts()], prefix=[BOS], progress=False)
    wanted = model(texts()).logits
    sq_cpu.quantize(model, calibration, scheme="O1", progress=False)
    folded = {group.name for group in model.sq_cpu_config.plan.groups if group.fold}
    assert any("v_proj" in name for name in folded)
    after = prefix_of(model)
    assert after is not None
    assert not torch.allclose(after.values[0], before.values[0], rtol=1e-3)
    assert off(model(texts()).logits, wanted) < 0.05


@pytest.mark.parametrize("kv", ["int8", "bf16"])
@pytest.mark.parametrize("prefix", [(BOS,), (BOS, 2, 0)])
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_fused_model(name: str, prefix: tuple[int, ...], kv: Any) -> None:
    windowed = {"sliding_window": 6} if name == "gemma3_text" else {}
    model = quantized(name, prefix=prefix, **windowed)
    ids = texts(prefix)
    ids[1, : len(prefix)] = 9  # one that does not begin with it, and has none of its tokens
    batch = padded(ids)
    if name != "bloom":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    kept = batch["attention_mask"].bool()
    base = model.base_model
    plain, plain_padded = base(ids)[0], base(**batch)[0]
    sq_cpu.fuse(model, kv=kv)
    made, made_padded = base(ids)[0], base(**batch)[0]
    # Int8 keys and values, and codes that they turn over.
    assert off(made, plain) < 0.08
    assert off(made_padded[kept], plain_padded[kept]) < 0.08
    assert not torch.equal(made, plain)  # the program made them
    # What the prefix's own rows give is the float model's, and not computed.
    first = base(ids[:1, : len(prefix)])[0]
    assert torch.equal(first[0], made[0, : len(prefix)])
    assert torch.equal(first[0], plain[0, : len(prefix)])
    spoil(model, prefix)
    again, again_padded = base(ids)[0], base(**batch)[0]
    if name == "gemma3_text":  # its embeddings' multiplier is measured anew, in all rows
        assert off(again, made) < 0.01
        assert off(again_padded[kept], made_padded[kept]) < 0.01
    else:
        assert torch.equal(again, made)
        assert torch.equal(again_padded[kept], made_padded[kept])


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_fused_model_goes_on(name: str) -> None:
    model = quantized(name)
    sq_cpu.fuse(model)
    ids = texts()
    base = model.base_model
    whole = base(ids)[0]
    for cut in (1, 5):
        cache = DynamicCache(config=model.config)
        first = base(ids[:, :cut], past_key_values=cache, use_cache=True)[0]
        rest = base(ids[:, cut:], past_key_values=cache, use_cache=True)[0]
        assert torch.equal(torch.cat([first, rest], dim=1), whole)


def test_a_fused_model_generates() -> None:
    model = quantized("llama", tie_word_embeddings=False)
    sq_cpu.fuse(model)
    ids = texts()
    ways: list[dict[str, Any]] = [
        GREEDY,
        GREEDY | {"num_beams": 3},
        GREEDY | {"custom_generate": sq_cpu.decoding_loop},
    ]
    given = [padded(ids), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    def made() -> list[Tensor]:
        return [model.generate(**x, **way, suppress_tokens=[BOS]) for way in ways for x in given]

    wanted = made()
    spoil(model)
    for a, b in zip(made(), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FUSED)
def test_a_scheduler(name: str) -> None:
    model = quantized(name)
    sq_cpu.fuse(model)
    prompts = [*(text.tolist() for text in texts()), [BOS], [BOS, 7], [BOS], [5, 6]]
    prompts.append([BOS, *[8] * 62])  # to the end of its page
    alone = {
        number: model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)).long(),
            **GREEDY | {"max_new_tokens": 1 if len(prompt) > 60 else 12},
        )[0, len(prompt) :].tolist()
        for number, prompt in enumerate(prompts)
    }
    for options in ({}, {"rows": 5}, {"pages": 2}):
        scheduler = Scheduler(model, **options)
        numbers = {
            scheduler.add(
                Request(
                    prompt=prompt,
                    max_new_tokens=1 if len(prompt) > 60 else 12,
                    stop_tokens=(),
                    logprobs=2,
                )
            ): number
            for number, prompt in enumerate(prompts)
        }
        made: dict[int, list[int]] = {number: [] for number in alone}
        while scheduler.busy:
            for token in scheduler.step():
                made[numbers[token.request]].append(token.id)
        assert made == alone
        assert scheduler.pages_used == 0


def test_the_order_of_fusing() -> None:
    model = quantized("llama")
    prefix = prefix_of(model)
    sq_cpu.fuse(model)
    assert prefix_of(model) is prefix
    with pytest.raises(SqCpuError, match="the model is fused"):
        use_prefix(model, None)
    sq_cpu.fuse(model, enabled=False)
    assert prefix_of(model) is prefix
    use_prefix(model, make_prefix(tiny_model("llama", head_dim=8), [BOS]))
    with pytest.raises(SqCpuError, match="kv heads of 8 channels for layer 0"):
        sq_cpu.fuse(model)
    assert prefix_of(model) is not None


def test_a_model_that_is_seen_with_its_prefix_fuses() -> None:
    # The ids of the call that shows what a model does begin with 0, like this prefix.
    model = quantized("llama", prefix=(0,))
    spoil(model, (0,))
    sq_cpu.fuse(model)
    ids = texts((0,))
    assert torch.isfinite(model(ids).logits).all()
