"""Right folds are proven; wrong ones, as other implementations make them, are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from folding_cases import TYPES, LeakyNorm, assert_unchanged, random_scales, refused, state
from tiny import batches, inputs, tiny_model
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import Layout, SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.smoothing.proof import prove_folds, refused_folds, running


def claim(model: Any, producer: str, *consumers: str, offset: float = 0.0) -> SmoothingGroup:
    """Give the group that says so, every output of the producer being an input of the consumers."""
    layout = Layout(1, 0, len(model.get_parameter(f"{producer}.weight")))
    return SmoothingGroup(producer, consumers, layout=layout, producer=producer, norm_offset=offset)


def refusal(name: str, model: Any, group: SmoothingGroup, s: Tensor | None = None) -> str:
    """Give why the proof refuses the group, "" if it does not."""
    (batch,) = inputs(name, 1)
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    generator = torch.Generator().manual_seed(4)
    if s is None:
        s = torch.exp(0.1 * torch.randn(group.layout.channels, generator=generator))
    with evaluating(model):
        found = refused_folds(
            model, {group: s}, prove_folds(model, [group], lambda: [model(**batch)[0]])
        )
    return found.get(group, "")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_GPTJ_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_FALCON_QKV = "self_attention.query_key_value"
_NORM_1, _NORM_2 = "input_layernorm", "post_attention_layernorm"
_BERT_NORM = "attention.output.LayerNorm"
_NEXT_BERT_QKV = tuple(f"layer.1.{name}" for name in _BERT_QKV)
_EXPERTS = tuple(f"mlp.experts.{index}.gate_up_proj" for index in range(4))
_DOWN = ("mlp.down_proj",)
_USED = "something else uses"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "block", "producer", "consumers", "reason"),
    [
        # Post-norm: the norm's output is the residual too.
        ("opt-350m", "model.decoder.layers.1", "self_attn_layer_norm", _QKV, "fc1 (Linear)"),
        ("opt-350m", "model.decoder.layers.1", "self_attn_layer_norm", ("fc1",), _USED),
        ("bloom-postnorm", "transformer.h.1", "input_layernorm", (_FALCON_QKV,), _USED),
        ("bert", "bert.encoder.layer.1", _BERT_NORM, _BERT_QKV, "intermediate.dense (Linear)"),
        ("bert", "bert.encoder.layer.1", _BERT_NORM, ("intermediate.dense",), _USED),
        ("bert", "bert.encoder", "layer.0.output.LayerNorm", _NEXT_BERT_QKV, _USED),
        # A norm of attention's output, which goes to the residual.
        ("gemma2", "model.layers.1", _NORM_2, _MLP, _USED),
        ("gemma3_text", "model.layers.1", _NORM_2, _MLP, _USED),
        ("glm4", "model.layers.1", "post_self_attn_layernorm", ("mlp.gate_up_proj",), _USED),
        ("olmo2", "model.layers.1", _NORM_2, _MLP, _USED),
        # Parallel residual: one norm for both attention and MLP.
        ("gptj", "transformer.h.1", "ln_1", _GPTJ_QKV, "mlp.fc_in (Linear)"),
        ("gptj", "transformer.h.1", "ln_1", ("mlp.fc_in",), "_proj (Linear)"),
        ("phi", "model.layers.1", _NORM_1, _QKV, "mlp.fc1 (Linear)"),
        ("phi", "model.layers.1", _NORM_1, ("mlp.fc1",), "_proj (Linear)"),
        ("falcon", "transformer.h.1", _NORM_1, (_FALCON_QKV,), "mlp.dense_h_to_4h (Linear)"),
        ("stablelm-parallel", "model.layers.1", _NORM_1, _MLP, "_proj (Linear)"),
        # One consumer of three is missing.
        ("llama", "model.layers.1", _NORM_1, _QKV[:2], "v_proj (Linear)"),
        # The router reads the norm's output too.
        ("mixtral", "model.layers.1", _NORM_2, _EXPERTS, "mlp.gate (MixtralTopKRouter)"),
        # No activation function but ReLU commutes with s.
        ("gpt2", "transformer.h.1", "mlp.c_fc", ("mlp.c_proj",), "act (NewGELUActivation)"),
        ("phi", "model.layers.1", "mlp.fc1", ("mlp.fc2",), "_fn (NewGELUActivation)"),
        ("whisper", "model.encoder.layers.1", "fc1", ("fc2",), "_fn (GELUActivation)"),
        # Not the linear half of a gated MLP.
        ("llama", "model.layers.1", "mlp.gate_proj", _DOWN, "act_fn (SiLUActivation)"),
        # Not what attention averages.
        ("stablelm", "model.layers.1", "self_attn.q_proj", ("self_attn.o_proj",), "not linear"),
    ],
)
def test_a_wrong_row_is_refused(
    name: str,
    block: str,
    producer: str,
    consumers: tuple[str, ...],
    reason: str,
    dtype: torch.dtype,
) -> None:
    model = tiny_model(name, dtype=dtype)
    with linearized(model):
        paths = (f"{block}.{path}" for path in (producer, *consumers))
        offset = 1.0 if name.startswith("gemma") else 0.0
        assert reason in refusal(name, model, claim(model, *paths, offset=offset))


@pytest.mark.parametrize(
    ("name", "producer", "consumer", "layout"),
    [
        # Query heads 0 and 1 read key-value head 0: not heads 0 and 2.
        (
            "llama",
            "self_attn.v_proj",
            "self_attn.o_proj",
            Layout(1, 0, 24, kv_heads=1, repeats=2),
        ),
        # Phi-3 and GLM keep [gate; up].
        ("phi3", "mlp.gate_up_proj", "mlp.down_proj", Layout(1, 0, 48)),
        # v is last, not k.
        (
            "phi3",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            Layout(1, 32, 48, kv_heads=2, repeats=2),
        ),
        # [q, k, v] of each head; or of all heads.
        ("gpt_neox", "attention.query_key_value", "attention.dense", Layout(1, 64, 96)),
        ("mpt", "attn.Wqkv", "attn.out_proj", Layout(4, 16, 24)),
        # [k; v] of each head of latent attention: not all k before all v.
        ("deepseek_v3", "self_attn.kv_b_proj", "self_attn.o_proj", Layout(1, 32, 80)),
    ],
)
def test_a_wrong_layout_is_refused(name: str, producer: str, consumer: str, layout: Layout) -> None:
    model = tiny_model(name)
    with linearized(model):
        right = next(g for g in smoothing_groups(model) if (g.producer or "").endswith(producer))
        assert right.consumers[0].endswith(consumer)
        wrong = SmoothingGroup("wrong", right.consumers, layout, producer=right.producer)
        assert refusal(name, model, right) == ""
        assert f"the output of {right.producer}" in refusal(name, model, wrong)


def test_shared_parameters_are_refused() -> None:
    tied = tiny_model("gemma")
    group = claim(tied, "model.norm", "lm_head", offset=1.0)
    assert "are the same parameter" in refusal("gemma", tied, group)
    untied = tiny_model("gemma", tie_word_embeddings=False)
    assert refusal("gemma", untied, group) == ""

    model = tiny_model("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    group = smoothing_groups(model)[0]
    assert refusal("llama", model, group) == (
        "model.layers.0.input_layernorm.weight and model.layers.1.input_layernorm.weight "
        "are the same parameter"
    )


def test_a_shared_bias_is_refused() -> None:
    model = tiny_model("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.bias = first.v_proj.bias
    groups = [g for g in smoothing_groups(model) if g.name.endswith("v_proj")]
    message = (
        "model.layers.0.self_attn.v_proj.bias and model.layers.1.self_attn.v_proj.bias "
        "are the same parameter"
    )
    assert [refusal("llama", model, group) for group in groups] == [message, message]


def test_a_module_under_two_names_shares_nothing() -> None:
    model = tiny_model("llama")
    model.alias = model.model.layers
    groups = [group for group in smoothing_groups(model) if group.producer]
    assert [refusal("llama", model, group) for group in groups] == [""] * 8


def test_two_producers_in_each_others_place_are_refused() -> None:
    model = tiny_model("llama")
    block = "model.layers.1"
    wrong = [
        claim(model, f"{block}.{producer}", *(f"{block}.{path}" for path in paths))
        for producer, paths in ((_NORM_1, _MLP), (_NORM_2, _QKV))
    ]
    (batch,) = inputs("llama", 1)
    s = dict.fromkeys(wrong, torch.ones(32))
    with evaluating(model):
        assert refused_folds(
            model, s, prove_folds(model, s, lambda: [model(**batch)[0]])
        ).keys() == set(wrong)


@pytest.mark.parametrize("kind", ["producer", "consumer"])
def test_a_linear_with_a_hook_of_its_own_is_refused(kind: str) -> None:
    # It adds a constant, which nothing divides by s.
    model = tiny_model("llama")
    group = next(g for g in smoothing_groups(model) if g.name.endswith("v_proj"))
    assert group.producer is not None
    if kind == "producer":
        hooked = model.get_submodule(group.producer)
        hooked.register_forward_hook(lambda _module, _args, y: y + 1.0)
    else:
        hooked = model.get_submodule(group.consumers[0])
        hooked.register_forward_pre_hook(lambda _module, args: (args[0] + 1.0,))
    assert "has forward hooks" in refusal("llama", model, group)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_an_offset_norm_is_not_a_plain_one(name: str) -> None:
    model = tiny_model(name)
    group = smoothing_groups(model)[0]
    plain = claim(model, group.name, *group.consumers, offset=0.0)
    assert (refusal(name, model, group), group.norm_offset) == ("", 1.0)
    assert "more than rounding in float32 away" in refusal(name, model, plain)
    llama = tiny_model("llama")
    group = smoothing_groups(llama)[0]
    offset = claim(llama, group.name, *group.consumers, offset=1.0)
    assert "more than rounding in float32 away" in refusal("llama", llama, offset)


def test_what_bf16_cannot_hold_is_refused() -> None:
    # (1 + w) / s is near 0 and w near -1, where bf16 has steps of 2^-8: it says -1 or 2^-8 more.
    s = torch.ones(32)
    s[3] = 1024.0
    model = tiny_model("gemma")
    group = smoothing_groups(model)[0]
    assert refusal("gemma", model, group, s) == ""
    reason = f"{group.producer} with folded weights is more than rounding in bfloat16 away"
    assert refusal("gemma", model.bfloat16(), group, s) == reason
    # A plain norm holds any s.
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert refusal("llama", model, smoothing_groups(model)[0], s) == ""


def test_every_output_of_the_model_counts() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model("llama")

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            seen: list[Tensor] = []
            norm = self.model.model.layers[1].input_layernorm
            handle = norm.register_forward_hook(lambda _module, _args, y: seen.append(y))
            logits = self.model(ids).logits
            handle.remove()
            return {"logits": logits, "features": seen[0].clone()}

    model = TwoOutputs()
    # A row would name these paths; groups of the inner model, seen from the outer one.
    groups = smoothing_groups(model.model)
    scales = {
        replace(
            group,
            producer=f"model.{group.producer}",
            consumers=tuple(f"model.{name}" for name in group.consumers),
        ): torch.ones(group.layout.channels)
        for group in groups
        if group.producer
    }
    run = running(model, ((batches(1)[0],), {}))
    assert run is not None
    with evaluating(model):
        refused = refused_folds(model, scales, prove_folds(model, scales, run))
    assert {group.name for group in refused} == {"model.layers.1.input_layernorm"}


# --- right and wrong folds of our own rows ------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_folds_are_proven_in_any_dtype(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = state(model)
    assert refused(model, random_scales(model, spread=1)) == {}
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_use_is_caught_and_its_group_named(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    before = state(model)
    assert refused(model, random_scales(model, spread=0.1)) == {
        "model.layers.1.post_attention_layernorm": "something else uses the output of "
        "model.layers.1.post_attention_layernorm, or is not linear in it"
    }
    assert_unchanged(model, before)


def test_a_group_that_misses_a_consumer_is_caught_and_it_is_named() -> None:
    model = tiny_model("llama")
    before = state(model)
    scales = {
        replace(group, consumers=group.consumers[:2]): s
        for group, s in random_scales(model).items()
        if group.name == "model.layers.0.input_layernorm"
    }
    assert refused(model, scales) == {
        "model.layers.0.input_layernorm": "model.layers.0.self_attn.v_proj (Linear) takes the "
        "output of model.layers.0.input_layernorm"
    }
    assert_unchanged(model, before)


def test_an_unsmooth_activation_is_caught() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[1].activation_fn = nn.GELU()  # unlike what the config says
    assert list(refused(model, random_scales(model))) == ["model.decoder.layers.1.fc1"]


def test_several_wrong_folds_are_all_found() -> None:
    model = tiny_model("opt", num_hidden_layers=5)
    wrong = (0, 3, 4)
    for index in wrong:
        model.model.decoder.layers[index].activation_fn = nn.GELU()
    found = refused(model, random_scales(model))
    assert list(found) == [f"model.decoder.layers.{index}.fc1" for index in wrong]


def test_a_weight_that_two_norms_share_is_refused() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    found = refused(model, random_scales(model))
    names = [f"model.layers.{index}.input_layernorm" for index in (0, 1)]
    assert found == dict.fromkeys(
        names, f"{names[0]}.weight and {names[1]}.weight are the same parameter"
    )


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    model = tiny_model("opt", dtype=torch.float16)
    scales = {group: torch.full_like(s, 2.0**-20) for group, s in random_scales(model).items()}
    found = refused(model, scales)
    assert set(found) == {group.name for group in scales}
    assert found["model.decoder.layers.0.fc1"].endswith("fc1.weight would overflow float16")


def test_bad_scales_are_refused() -> None:
    model = tiny_model("llama")
    (group, *_) = smoothing_groups(model)
    for s in (torch.ones(31), torch.zeros(32), torch.full((32,), torch.inf), -torch.ones(32)):
        with pytest.raises(SqCpuError, match="s must be 32 positive finite numbers"):
            refused(model, {group: s})


def test_a_model_that_gives_nan_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(SqCpuError, match="gives NaN"):
        refused(model, random_scales(model))


def test_a_block_that_is_never_called_is_refused() -> None:
    model = tiny_model("llama")
    scales = random_scales(model)
    model.config.num_hidden_layers = 1  # the model runs that many of its layers
    found = refused(model, scales)
    assert found == dict.fromkeys(
        (group.name for group in scales if group.block == "model.layers.1"),
        "the example never reaches it, so the fold cannot be proven",
    )


def test_the_proof_leaves_no_trace() -> None:
    model = tiny_model("llama").train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    refused(model, random_scales(model))
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
