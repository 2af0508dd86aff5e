"""Fused decoders: their calls, and `generate` in all of its modes, against the plain model's."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_int8_generate import step_by_step
from test_lowering import FLOAT, HEADS, PROGRAMS, partly_quantized, quantized
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sq_cpu
from sq_cpu import Int8Cache, SqCpuError
from sq_cpu.inference.fusing import FusedDecoder, fuse, fused_of
from sq_cpu.inference.program import StepRows
from sq_cpu.kernels.paged_attention import BatchRows, KvPages

NEW = 20
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def prompt(batch: int = 1, length: int = 30, seed: int = 5) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def fused(name: str, **options: Any) -> Any:
    model = quantized(name, **options)
    fuse(model)
    return model


@pytest.fixture(
    params=[
        "llama", "gemma3_text", "mistral", "phi", "granite", "olmo2", "gpt2", "opt", "gpt_neox",
        "falcon-new", "bloom", "mpt", "gptj", "mixtral", "qwen2_moe",
    ]
)  # fmt: skip
def model(request: pytest.FixtureRequest) -> Any:
    name = request.param
    windowed = {"sliding_window": 20} if name in ("llama", "gemma3_text", "mistral", "phi") else {}
    return fused(name, **windowed | ({"use_cache": True} if name == "mpt" else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROGRAMS)
@torch.no_grad()
def test_close_to_the_plain_model(name: str, dtype: torch.dtype) -> None:
    model = quantized(name, dtype=dtype)
    plain = model(prompt(2, 50)).logits
    fuse(model)
    made = model(prompt(2, 50)).logits
    assert made.dtype == dtype
    assert made.shape == plain.shape
    assert not torch.equal(made, plain)  # the program made them
    # Int8 keys and values, and codes that they turn over in each layer: up to 4 % here.
    assert (made - plain).float().norm() / plain.float().norm() < 0.08
    fuse(model, enabled=False)
    assert torch.equal(model(prompt(2, 50)).logits, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", FLOAT)
@torch.no_grad()
def test_linears_in_float_are_close(what: str, dtype: torch.dtype) -> None:
    model = partly_quantized(*FLOAT[what], dtype)
    plain = model(prompt(2, 50)).logits
    fuse(model)
    made = model(prompt(2, 50)).logits
    assert (made - plain).float().norm() / plain.float().norm() < 0.08


def alone(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a sequence's last position: of the program, and of the model."""
    fused = fused_of(model)
    assert fused is not None
    assert fused._to_logits is not None
    batch, new = ids.shape
    rows = BatchRows([new] * batch, [new] * batch, [[i] for i in range(batch)])
    first_row, length, table = rows.tensors
    positions = torch.arange(new).repeat(batch)
    step = StepRows(ids.flatten(), positions, first_row, length, table[None], first_row[1:] - 1)
    caches = [(KvPages(batch, *shape), 0) for shape in fused.program.cache_shapes]
    return fused.logits(step, caches), model(ids).logits[:, -1].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PROGRAMS, *HEADS])
@torch.inference_mode()
def test_heads_in_float(name: str, dtype: torch.dtype) -> None:
    """Logits are the model's own, and the same bits whatever lies beside a row."""
    model = fused(name, dtype=dtype, **HEADS.get(name, ({},))[0])
    ids = prompt(5, 33)
    together, wanted = alone(model, ids)
    # The head alone differs: fp32 sums, or what the model rounds to bf16.
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    )
    torch.testing.assert_close(together, wanted, **tolerance)
    for row in range(5):
        assert torch.equal(alone(model, ids[row : row + 1])[0][0], together[row])


@torch.no_grad()
def test_batches_and_cuts_have_the_same_bits(model: Any) -> None:
    ids = prompt(3, 50)
    mask = torch.ones_like(ids)
    pads = (0, 11, 37)
    for i, count in enumerate(pads):
        mask[i, :count] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    base = model.base_model  # a float head multiplies otherwise where there are other rows
    together = base(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    for i, count in enumerate(pads):
        row = ids[i : i + 1, count:]
        alone = base(row).last_hidden_state
        assert torch.equal(together[i, count:], alone[0])
        cache = DynamicCache(config=model.config)
        parts = [base(part, past_key_values=cache).last_hidden_state for part in row.split(7, 1)]
        assert torch.equal(torch.cat(parts, dim=1), alone)
        assert cache.get_seq_length() == row.shape[1]


@torch.no_grad()
def test_positions_that_a_call_does_not_give() -> None:
    """OPT counts them from a sequence's first token, as its own code does."""
    ids, mask = prompt(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    model = fused("opt")
    together = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[1, 7:], model(ids[1:, 7:]).logits[0])
    cache = DynamicCache(config=model.config)
    parts = [
        model(
            ids[:, begin : begin + 10], attention_mask=mask[:, : begin + 10], past_key_values=cache
        )
        for begin in (0, 10)
    ]
    torch.testing.assert_close(
        torch.cat([part.logits for part in parts], dim=1)[:, 7:], together[:, 7:]
    )


@torch.no_grad()
def test_threads_give_the_same_bits() -> None:
    model = fused("qwen3")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(model(prompt(2, 70)).logits)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_greedy(model: Any) -> None:
    ids = prompt(2)
    expected = step_by_step(model, ids, NEW)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    again = model.generate(ids, **GREEDY, past_key_values=Int8Cache(model))
    assert torch.equal(again, expected)


def test_padded_generate(model: Any) -> None:
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for i, count in enumerate((0, 11, 29)):
        mask[i, :count] = 0
    together = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **GREEDY)
    for i, count in enumerate((0, 11, 29)):
        alone = model.generate(ids[i : i + 1, count:], **GREEDY)
        assert torch.equal(together[i, 30:], alone[0, 30 - count :])


def test_beams_and_drafts(model: Any) -> None:
    ids = prompt()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)
    beams = model.generate(ids, **GREEDY, num_beams=3, num_return_sequences=3)
    assert beams.shape == (3, 30 + NEW)
    # The same search over each beam as a sequence of its own, without reordered caches.
    assert torch.equal(beams, model.generate(ids, **GREEDY, num_beams=3, num_return_sequences=3))
    plain_cache = model.generate(
        ids, **GREEDY, num_beams=3, num_return_sequences=3, use_cache=False
    )
    assert torch.equal(beams, plain_cache)


@pytest.mark.parametrize(
    "what",
    ["embeddings", "states", "mask", "cache", "gradient", "hole", "packed", "hooks", "config"],
)
def test_what_it_does_not_serve_runs_as_before(what: str) -> None:
    model = quantized("llama")
    ids = prompt(2, 12)

    def call() -> Any:
        if what == "gradient":
            return model(ids).logits.detach()
        with torch.no_grad():
            if what == "packed":
                positions = torch.tensor([[*range(5), *range(7)]])
                return model(ids, position_ids=positions, use_cache=False).logits
            if what == "hooks":
                seen: list[Tensor] = []
                hook = model.model.layers[0].register_forward_hook(lambda *x: seen.append(x[2]))
                model(ids)
                hook.remove()
                return seen[0]
            if what == "config":
                model.config.output_hidden_states = True
                states = model(ids).hidden_states
                model.config.output_hidden_states = False
                return torch.stack(states)
            if what == "embeddings":
                return model(inputs_embeds=model.model.embed_tokens(ids)).logits
            if what == "states":
                return torch.stack(model(ids, output_hidden_states=True).hidden_states)
            if what == "mask":
                full = torch.full((12, 12), -torch.inf).triu(1)
                return model(ids, attention_mask=full.expand(2, 1, 12, 12)).logits
            if what == "hole":
                mask = torch.ones_like(ids)
                mask[1, 5] = 0
                cache = DynamicCache(config=model.config)
                return model(ids, attention_mask=mask, past_key_values=cache).logits
            cache = StaticCache(config=model.config, max_cache_len=16)
            return model(ids, past_key_values=cache).logits

    expected = call()
    fuse(model)
    assert torch.equal(call(), expected)


def test_undone_and_copied() -> None:
    model = fused("llama")
    fuse(model)  # once is enough
    assert fused_of(model) is not None
    with pytest.raises(SqCpuError, match="not copied"):
        copy.deepcopy(model)
    fuse(model, enabled=False)
    fuse(model, enabled=False)
    assert fused_of(model) is None
    copy.deepcopy(model)
    with pytest.raises(SqCpuError, match="no program for deepseek_v3"):
        fuse(quantized("deepseek_v3"))


@torch.no_grad()
def test_a_call_that_fails_leaves_the_cache() -> None:
    model = fused("llama")
    cache = Int8Cache(model)
    model(prompt(1, 20), past_key_values=cache)
    with pytest.raises(SqCpuError, match="vocabulary"):
        model(torch.tensor([[1, 64]]), past_key_values=cache)
    assert cache.get_seq_length() == 20
    whole = model.model(prompt(1, 22)[:, :20]), model.model(prompt(1, 30)).last_hidden_state
    again = model.model(prompt(1, 30)[:, 20:], past_key_values=cache).last_hidden_state
    assert again.shape == whole[1][:, 20:].shape
    with pytest.raises(SqCpuError, match="positions go up to"):
        model(prompt(1, 2), position_ids=torch.tensor([[10**12, 10**12 + 1]]))
    model(prompt(1, 2), position_ids=torch.tensor([[600, 601]]))


@torch.no_grad()
def test_a_changed_model_is_compiled_again() -> None:
    model = fused("qwen3")
    ids = prompt(1, 12)
    before = model(ids).logits
    model.model.layers[0].input_layernorm.weight.mul_(3)
    changed = model(ids).logits
    assert not torch.equal(changed, before)
    fuse(model, enabled=False)
    fuse(model)
    assert torch.equal(model(ids).logits, changed)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, changed)
    model.to(torch.bfloat16)
    assert model(ids).logits.dtype == torch.bfloat16
    model.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(SqCpuError, match="no program"):
        model(ids)


@torch.no_grad()
def test_threads_that_call_one_model() -> None:
    model = fused("llama")
    inputs = [prompt(1, 20 + i, seed=i) for i in range(3)]
    expected = [model.model(ids).last_hidden_state for ids in inputs]

    def calls(number: int) -> bool:
        with torch.no_grad():
            return all(
                torch.equal(model.model(inputs[number]).last_hidden_state, expected[number])
                for _ in range(8)
            )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(calls, range(3)))


@torch.no_grad()
def test_rows_with_their_own_scale_are_counted(threads: Any) -> None:
    model = fused("llama", scheme="O3")
    made = {}
    for count in (1, 2):
        threads(count)
        sq_cpu.row_counts(model, reset=True)
        model(prompt(1, 30))
        made[count] = sq_cpu.row_counts(model)
    assert made[1] == made[2]
    rows = {name.rpartition(".")[2]: counts.rows for name, counts in made[1].items()}
    # One quantized input for q, k and v, and for up and gate.
    first = {"q_proj": 30, "o_proj": 30, "up_proj": 30, "down_proj": 30}
    assert rows == first | {"k_proj": 0, "v_proj": 0, "gate_proj": 0}
    assert sum(counts.underflowed + counts.clipped for counts in made[1].values()) > 0


def test_what_fails_while_fusing_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("llama")
    own = model.model.forward
    model.model.forward = own  # somebody's own, on the instance
    monkeypatch.setattr(FusedDecoder, "_finish_head", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    assert fused_of(model) is None
    assert model.model.__dict__["forward"] is own
    monkeypatch.undo()
    fuse(model)
    fuse(model, enabled=False)
    assert model.model.__dict__["forward"] is own


def test_other_batch_than_the_cache() -> None:
    model = fused("llama")
    cache = Int8Cache(model)
    with torch.no_grad():
        model(prompt(2), past_key_values=cache)
        with pytest.raises(SqCpuError, match="3 sequences for a cache of 2"):
            model(prompt(3), past_key_values=cache)


def test_ids_beyond_the_vocabulary() -> None:
    model = fused("llama")
    with (
        pytest.raises(SqCpuError, match="token 64 is not in the vocabulary of 64"),
        torch.no_grad(),
    ):
        model(torch.tensor([[1, 64]]))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral"])
def test_saved_while_fused(name: str, tmp_path: Any) -> None:
    model = fused(name)
    with torch.no_grad():
        expected = model(prompt()).logits
    sq_cpu.save(model, tmp_path / "out")
    loaded = sq_cpu.load(tmp_path / "out")
    fuse(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(prompt()).logits, expected)
