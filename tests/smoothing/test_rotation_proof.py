"""Values rotated in the weights: the model's function in fp64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import inputs, tiny_model
from transformers.models.llama import modeling_llama

from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearize
from sq_cpu.smoothing.fold import apply_folds
from sq_cpu.smoothing.proof import FoldProof, prove_folds

# Grouped heads with biases, one key-value head, as many as query heads; fused by part and by head;
# keys and values of a latent; two towers.
MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"head_dim": 64, "num_key_value_heads": 2}, 64),
    ("llama", {"head_dim": 48, "num_key_value_heads": 1}, 16),
    ("qwen2", {"hidden_size": 128, "num_key_value_heads": 4}, 32),
    ("gemma3_text", {"head_dim": 64}, 64),
    ("opt", {"hidden_size": 64, "word_embed_proj_dim": 64}, 16),
    ("phi3", {"hidden_size": 64}, 16),
    ("gpt2", {"n_embd": 64}, 16),
    ("gpt_neox", {"hidden_size": 64}, 16),
    ("bloom", {"hidden_size": 64}, 16),
    ("falcon", {"hidden_size": 64}, 16),
    ("falcon-rw", {"hidden_size": 64}, 16),
    ("falcon-new", {"hidden_size": 64}, 16),
    ("mpt", {"d_model": 64}, 16),
    ("deepseek_v3", {"v_head_dim": 16}, 16),
    ("bert", {"hidden_size": 64}, 16),
    ("t5", {"d_kv": 16}, 16),
    ("whisper", {"d_model": 64}, 16),
    ("vit", {"hidden_size": 64}, 16),
]


def outputs(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch)[0]]


def proven(model: Any, groups: list[SmoothingGroup], batch: dict[str, Any]) -> FoldProof:
    with evaluating(model):
        return prove_folds(model, groups, lambda: outputs(model, batch), rotated=groups)


@pytest.mark.parametrize(
    ("name", "config", "block"), MODELS, ids=lambda value: value if type(value) is str else ""
)
def test_the_function_is_kept(name: str, config: dict[str, Any], block: int) -> None:
    model = tiny_model(name, **config)
    linearize(model)
    (batch,) = inputs(name, 1)
    groups = [group for group in smoothing_groups(model) if group.head_block]
    assert len(groups) >= 2
    assert {group.head_block for group in groups} == {block}
    proof = proven(model, groups, batch)
    assert set(proof.rotations) == set(groups)
    assert not any(proof.rotations.values()), proof.rotations
    wide = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    (before,) = outputs(wide, batch)
    generator = torch.Generator().manual_seed(2)
    scales = {g: torch.rand(g.layout.channels, generator=generator) + 0.5 for g in groups}
    weights = [model.get_parameter(f"{group.producer}.weight").clone() for group in groups]
    apply_folds(wide, scales, {group: group.head_block for group in groups})
    (after,) = outputs(wide, batch)
    # The weights are folded in fp32.
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    for group, weight in zip(groups, weights, strict=True):
        changed = model.get_parameter(f"{group.producer}.weight") != weight
        assert int(changed.any(dim=1).sum()) == group.layout.channels  # the rows of v alone


def test_what_treats_channels_of_a_head_differently_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", head_dim=64)
    model.set_attn_implementation("eager")
    group = next(g for g in smoothing_groups(model) if g.name.endswith("1.self_attn.v_proj"))
    (batch,) = inputs("llama", 1)
    assert proven(model, [group], batch).rotations == {group: ""}
    attend = modeling_llama.eager_attention_forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        # Half of a head's channels come from another token: powers of two do not tell.
        made, shares = attend(*args, **kwargs)
        half = torch.arange(made.shape[-1]) % 2 == 0
        return torch.where(half, made, made.roll(1, dims=1)), shares

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", mixed)
    found = proven(model, [group], batch)
    assert found.reasons == {group: ""}
    why = "LlamaAttention does not treat the channels of a head alike"
    assert found.rotations == {group: why}


def test_what_does_not_run_in_fp64_is_refused() -> None:
    model = tiny_model("llama", head_dim=64)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def narrow(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if hidden_states.dtype == torch.float64:
            raise TypeError("no fp64 here")
        return forward(hidden_states=hidden_states, **kwargs)

    attention.forward = narrow
    groups = [group for group in smoothing_groups(model) if group.head_block]
    (batch,) = inputs("llama", 1)
    found = proven(model, groups, batch).rotations
    why = "LlamaAttention does not run in fp64 (no fp64 here)"
    assert list(found.values()) == [why, ""]
