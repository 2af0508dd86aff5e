"""A prefix in float: nothing that a model makes of its first tokens itself is seen.

So the embeddings of these are spoilt, after the prefix was made: every other row has to stay what
it was, in every way to run a model.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from prefixes import BOS, GREEDY, off, padded, spoil, texts
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sq_cpu
from sq_cpu import Int8Cache, SqCpuError
from sq_cpu.inference.prefix import make_prefix, prefix_of, use_prefix

FAMILIES = [
    ("llama", {}),
    ("gemma3_text", {"sliding_window": 4}),
    ("gemma3_text", {"sliding_window": 40}),
    ("mistral", {"sliding_window": 5}),
    ("qwen3", {}),
    ("deepseek_v2", {}),
    ("mixtral", {}),
    ("opt", {}),
    ("gpt2", {}),
    ("gptj", {}),
    ("bloom", {}),
    ("mpt", {}),
    ("falcon-new", {}),
    ("gemma3", {}),
]


@pytest.fixture(params=FAMILIES, ids=lambda each: f"{each[0]}{[*each[1].values()] or ''}")
def float_model(request: pytest.FixtureRequest) -> Any:
    name, options = request.param
    return tiny_model(name, **({} if name == "gemma3" else options))


@pytest.mark.parametrize("prefix", [(BOS,), (BOS, 2, 0)])
@torch.no_grad()
def test_logits_of_a_float_model(float_model: Any, prefix: tuple[int, ...]) -> None:
    ids = texts(prefix)
    batch = padded(ids)
    if float_model.config.model_type not in ("bloom", "mpt"):  # which know only distances
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    wanted, wanted_padded = float_model(ids).logits, float_model(**batch).logits
    kept = batch["attention_mask"].bool()
    use_prefix(float_model, make_prefix(float_model, prefix))
    spoil(float_model, prefix)
    # The same sums, but for their order.
    assert off(float_model(ids).logits, wanted) < 1e-5
    assert off(float_model(ids, use_cache=False).logits, wanted) < 1e-5
    assert off(float_model(ids, return_dict=False)[0], wanted) < 1e-5
    assert off(float_model(**batch).logits[kept], wanted_padded[kept]) < 1e-5
    use_prefix(float_model, None)
    assert off(float_model(ids).logits, wanted) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["opt", "bloom"])
@torch.no_grad()
def test_padding_in_front_without_positions(name: str, fused: bool) -> None:
    """Of a quantized model; it counts positions itself, or has none."""
    model = tiny_model(name, tie_word_embeddings=False)
    ids = texts()
    calibration = sq_cpu.calibrate(model, [ids], prefix=[BOS])
    sq_cpu.quantize(model, calibration)
    wanted = model(ids).logits
    spoil(model)
    if fused:
        sq_cpu.fuse(model)
    batch = padded(ids)
    made = model(**batch).logits
    generated = model.generate(**batch, **GREEDY)
    for row, text in enumerate(ids):
        bound = 0.02 if fused else 1e-5  # an int8 cache
        assert off(made[row, row : row + len(text)], wanted[row]) < bound
        alone = {name: each[row : row + 1, row:] for name, each in batch.items()}
        assert torch.equal(generated[row, row:], model.generate(**alone, **GREEDY)[0])


@torch.no_grad()
def test_a_continued_cache(float_model: Any) -> None:
    ids = texts()
    wanted = float_model(ids).logits
    use_prefix(float_model, make_prefix(float_model, [BOS]))
    spoil(float_model)
    for cuts in ((1, 5, 14), (6, 7, 14), (13, 14)):
        cache = DynamicCache(config=float_model.config)
        parts = []
        for begin, end in zip((0, *cuts), cuts, strict=False):
            given = {"past_key_values": cache, "use_cache": True}
            parts.append(float_model(ids[:, begin:end], **given).logits)
        assert off(torch.cat(parts, dim=1), wanted) < 1e-5
        assert "update" not in vars(cache)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "bloom", "gpt2"])
def test_generate(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=False)
    ids = texts()
    batch = padded(ids)
    ways: list[dict[str, Any]] = [
        GREEDY,
        GREEDY | {"num_beams": 3},
        GREEDY | {"do_sample": True, "top_k": 5},
        GREEDY | {"use_cache": False},
    ]
    if name in ("llama", "gemma3_text"):
        ways.append(GREEDY | {"cache_implementation": "static", "disable_compile": True})

    def made() -> list[Tensor]:
        found = []
        for way in ways:
            for given in (batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
                torch.manual_seed(3)
                found.append(model.generate(**given, **way, suppress_tokens=[BOS]))
        return found

    wanted = made()
    use_prefix(model, make_prefix(model, [BOS]))
    spoil(model)
    for a, b in zip(made(), wanted, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_caches_of_other_classes() -> None:
    model = tiny_model("llama")
    ids = texts()
    use_prefix(model, make_prefix(model, [BOS]))
    wanted = [model(ids, past_key_values=cache).logits for cache in caches(model)]
    spoil(model)
    for cache, logits in zip(caches(model), wanted, strict=True):
        assert torch.equal(model(ids, past_key_values=cache).logits[..., 3:], logits[..., 3:])


def caches(model: Any) -> list[Any]:
    static = StaticCache(config=model.config, max_cache_len=32)
    return [DynamicCache(), DynamicCache(config=model.config), Int8Cache(model), static]


@torch.no_grad()
def test_int8_attention() -> None:
    model = tiny_model("llama")
    sq_cpu.use_int8_attention(model)
    ids = texts()
    without = model(ids).logits
    use_prefix(model, make_prefix(model, [BOS]))
    wanted = model(ids).logits
    assert off(wanted, without) < 0.02  # codes of int8 attention that are turned over
    spoil(model)
    assert torch.equal(model(ids).logits[..., 3:], wanted[..., 3:])


@torch.no_grad()
def test_where_it_is_not_used() -> None:
    model = tiny_model("llama")
    use_prefix(model, make_prefix(model, [BOS, 5]))
    ids = texts((BOS, 5))
    others = ids.clone()
    others[:, 1] = 6
    behind = padded(ids)  # no position_ids: BOS is not at 0 in all rows but the first
    cases: list[dict[str, Any]] = [
        {"input_ids": others},
        {"input_ids": ids[:, :1]},
        {"input_ids": ids, "position_ids": torch.arange(3, 17)[None]},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
        {name: each[1:] for name, each in behind.items()},
        {"input_ids": ids, "attention_mask": torch.ones(3, 1, 14, 14, dtype=torch.bool).tril()},
    ]
    with_prefix = [model(**case).logits for case in cases]
    use_prefix(model, None)
    for case, logits in zip(cases, with_prefix, strict=True):
        assert torch.equal(model(**case).logits, logits)


@torch.no_grad()
def test_a_copy_has_it_too() -> None:
    model = tiny_model("llama")
    use_prefix(model, make_prefix(model, [BOS]))
    twin = copy.deepcopy(model)
    ids = texts()
    wanted = model(ids).logits
    spoil(model)
    spoil(twin)
    assert prefix_of(twin) is not None
    assert off(twin(ids).logits, wanted) < 1e-5
    assert twin.base_model.forward is not model.base_model.forward


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_its_bits_do_not_depend_on_where_weights_lie(name: str) -> None:
    model = tiny_model(name)
    wanted = make_prefix(model, [BOS])
    for floats in (1, 2, 7, 10):
        for linear in model.modules():
            if isinstance(linear, torch.nn.Linear):
                weight = linear.weight
                moved = torch.empty(weight.numel() + floats)[floats:].view(weight.shape)
                linear.weight = torch.nn.Parameter(moved.copy_(weight.detach()))
        made = make_prefix(model, [BOS])
        for a, b in zip((*made.keys, *made.values), (*wanted.keys, *wanted.values), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(made.hidden, wanted.hidden)


def test_one_takes_the_place_of_another() -> None:
    model = tiny_model("llama")
    first, second = make_prefix(model, [BOS]), make_prefix(model, [BOS, 4])
    use_prefix(model, first)
    use_prefix(model, second)
    assert prefix_of(model) is second
    use_prefix(model, None)
    assert prefix_of(model) is None
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("bert", [BOS], "depend on later ones"),
        ("t5", [BOS], "also sees an encoder, whose text differs; leave the prefix out"),
        ("whisper", [BOS], "also sees an encoder, whose text differs; leave the prefix out"),
        ("vit", [BOS], "takes no ids, or no cache"),
        ("llama", [], "has 0 tokens; it has 1 to 8"),
        ("llama", [BOS] * 9, "has 9 tokens; it has 1 to 8"),
        ("llama", ["a"], "the prefix: token ids are a list of integers"),
        ("llama", [64], "64"),
    ],
)
def test_a_model_that_can_have_none(name: str, ids: list[Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=message):
        make_prefix(tiny_model(name), ids)


def test_layers_that_keep_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: forward(*a, **k | CACHELESS))
    with pytest.raises(SqCpuError, match="1 of its 2 layers keep keys and values"):
        make_prefix(model, [BOS])


CACHELESS: dict[str, Any] = {"past_key_values": None}


def test_attention_that_does_not_read_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Any, k: Tensor, v: Tensor, *args: Any) -> Any:
        return k[:, :, 1:].new_zeros(k.shape), v.new_zeros(v.shape)

    monkeypatch.setattr(DynamicCache, "update", update)
    with pytest.raises(SqCpuError, match="does not read what a cache returns"):
        make_prefix(tiny_model("llama"), [BOS])


@torch.no_grad()
def test_a_prefix_of_another_model() -> None:
    other = make_prefix(tiny_model("llama", head_dim=8), [BOS])
    model = tiny_model("llama")
    use_prefix(model, other)
    with pytest.raises(SqCpuError, match="kv heads of 8 channels for layer 0, the model"):
        model(texts())
    one_layer = make_prefix(tiny_model("llama", num_hidden_layers=1), [BOS])
    use_prefix(model, one_layer)
    with pytest.raises(SqCpuError, match="has nothing for layer 1"):
        model(texts())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_arguments_in_the_models_own_order(name: str) -> None:
    model = tiny_model(name).eval()
    ids = texts()
    plain = model.base_model(ids).last_hidden_state
    spoiled = spoil(copy.deepcopy(model))
    use_prefix(spoiled, make_prefix(model, (BOS,)))
    base = spoiled.base_model
    names = list(inspect.signature(model.base_model.forward).parameters)
    before = {"llama": ("attention_mask", "position_ids", "past_key_values")}.get(name)
    assert names[1] == ("past_key_values" if before is None else before[0])
    given = (ids, DynamicCache()) if before is None else (ids, None, None, DynamicCache())
    with torch.no_grad():
        made = base(*given, output_hidden_states=True)
        assert off(made.last_hidden_state, plain) < 1e-4
        assert torch.equal(made.hidden_states[-1], made.last_hidden_state)
        as_tuple = base(ids, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert off(as_tuple[0], plain) < 1e-4
        base.config.return_dict = False
        assert isinstance(base(ids), tuple)
