"""Every row of the families: folds keep the function, and every linear is accounted for."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import assert_same_model
from tiny import CONFIGS, inputs, tiny_model
from torch import Tensor, nn

import sq_cpu
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.models import families
from sq_cpu.models.calls import evaluating
from sq_cpu.models.families import FAMILIES, family_of, register_family
from sq_cpu.models.family import Family, Group, Stack
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearize, linearized, quantizable_linears
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.quantize import quantize
from sq_cpu.smoothing.fold import apply_folds
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.proof import prove_folds, refused_folds
from sq_cpu.smoothing.smooth import fold


@dataclass(frozen=True)
class Expected:
    """What a row leaves: numbers in names are written as *, names in blocks are those within."""

    folds: int
    """In all of a tiny model's blocks."""
    at_run_time: frozenset[str]
    """The consumers of each group that is not folded, but for lm_head."""
    matrices: frozenset[str]
    """Parameters of two dimensions or more that stay float: all but linears' weights."""


def expected(folds: int, *at_run_time: str, matrices: str = "embed_tokens lm_head") -> Expected:
    return Expected(folds, frozenset(at_run_time), frozenset(matrices.split()))


_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_ROUTED = "embed_tokens lm_head mlp.gate"
_EXPERT = "mlp.experts.*.gate_up_proj"
_SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"
_OPT = "embed_tokens embed_positions"
_FALCON = "word_embeddings"
_BERT = "word_embeddings token_type_embeddings position_embeddings"
_BERT_QKV = "attention.self.query attention.self.key attention.self.value"
_T5 = "shared relative_attention_bias"
_T5_KV = "layer.*.EncDecAttention.k layer.*.EncDecAttention.v"

EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), expected(8)),
    "smollm3": expected(8, matrices="embed_tokens"),
    **dict.fromkeys(("mixtral", "olmoe"), expected(4 + 8, _EXPERT, matrices=_ROUTED)),
    "qwen2_moe": expected(
        4 + 2 + 4 + 1,
        _EXPERT,
        "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert_gate",
        matrices=_ROUTED,
    ),
    "qwen3_moe": expected(4 + 2 + 4, _EXPERT, matrices=_ROUTED),
    "deepseek_v2": expected(8 + 2 + 4 + 1, _EXPERT, _SHARED, matrices=_ROUTED),
    "deepseek_v2-lite": expected(6 + 2 + 4 + 1, _EXPERT, _SHARED, matrices=_ROUTED),
    "deepseek_v3": expected(8 + 2 + 4 + 1, _EXPERT, _SHARED, matrices=_ROUTED),
    "phi": expected(4, "mlp.fc2"),
    "phi-relu": expected(6),
    **dict.fromkeys(("phi3", "glm", "glm4"), expected(8)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), expected(8, matrices="embed_tokens")),
    "gemma3": expected(
        8 + 6,
        "mlp.fc2",
        matrices="embed_tokens mm_input_projection_weight patch_embedding position_embedding",
    ),
    "olmo2": expected(4, _QKV, "mlp.gate_proj mlp.up_proj"),
    "stablelm": expected(8),
    "stablelm-parallel": expected(6),
    "opt": expected(8, matrices=_OPT),
    "opt-350m": expected(
        4, _QKV, "fc1", "model.decoder.project_in", "model.decoder.project_out", matrices=_OPT
    ),
    "bloom": expected(6, "mlp.dense_4h_to_h", matrices="word_embeddings"),
    "bloom-postnorm": expected(
        2,
        "self_attention.query_key_value",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        matrices="word_embeddings",
    ),
    "gpt2": expected(6, "mlp.c_proj", matrices="wte wpe"),
    "gptj": expected(4, "mlp.fc_out", matrices="wte lm_head"),
    "gpt_neox": expected(6, "mlp.dense_4h_to_h", matrices="embed_in lm_head"),
    "gpt_neox-sequential": expected(6, "mlp.dense_4h_to_h", matrices="embed_in lm_head"),
    "falcon": expected(4, "mlp.dense_4h_to_h", matrices=_FALCON),
    "falcon-rw": expected(6, "mlp.dense_4h_to_h", matrices=_FALCON),
    "falcon-new": expected(6, "mlp.dense_4h_to_h", matrices=_FALCON),
    "falcon-new_one_norm": expected(4, "mlp.dense_4h_to_h", matrices=_FALCON),
    "mpt": expected(6, "ffn.down_proj", matrices="wte"),
    "mpt-clipped": expected(4, "ffn.down_proj", "attn.out_proj", matrices="wte"),
    "bert": expected(
        2,
        _BERT_QKV,
        "intermediate.dense",
        "output.dense",
        "cls.predictions.transform.dense",
        matrices=_BERT,
    ),
    "roberta": expected(2 + 2, _BERT_QKV, "intermediate.dense", "lm_head.dense", matrices=_BERT),
    "t5": expected(2 * 4 + 2 * 6, _T5_KV, matrices=_T5),
    "t5-gated": expected(2 * 4 + 2 * 6, _T5_KV, matrices=_T5),
    "whisper": expected(
        2 * 3 + 2 * 5,
        "encoder_attn.k_proj encoder_attn.v_proj",
        "fc2",
        matrices="embed_tokens embed_positions conv1 conv2",
    ),
    "vit": expected(
        6, "mlp.fc2", "classifier", matrices="cls_token projection position_embeddings"
    ),
    "clip": expected(
        2 * 6,
        "mlp.fc2",
        "text_projection",
        "visual_projection",
        matrices="token_embedding patch_embedding position_embedding",
    ),
}


def starred(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def matrix_name(name: str) -> str:
    """Give the last part of a parameter's name that tells which it is."""
    name = starred(name).removesuffix(".weight")
    return "mlp.gate" if name.endswith("mlp.gate") else name.rpartition(".")[2]


def first_output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch)[0]
    return result


def head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def random_scales(groups: tuple[SmoothingGroup, ...]) -> dict[SmoothingGroup, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        group: torch.exp(2 * torch.randn(group.layout.channels, generator=generator))
        for group in groups
        if group.producer is not None
    }


def proven(model: Any, scales: dict[SmoothingGroup, Tensor], name: str) -> dict[str, str]:
    """Give what the proof refuses on a linearized model, by group name, and why."""
    (batch,) = inputs(name, 1)
    with evaluating(model):
        refused = refused_folds(
            model, scales, prove_folds(model, scales, lambda: [model(**batch)[0]])
        )
    return {group.name: reason for group, reason in refused.items()}


def test_every_row_and_variant_has_a_case() -> None:
    types = {name for family in FAMILIES for name in family.model_types}
    # These two are CLIP's halves.
    assert types - {"clip_text_model", "clip_vision_model"} == {n.split("-")[0] for n in CONFIGS}
    assert EXPECTED.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_folds_keep_the_function_and_nothing_is_missed(name: str) -> None:
    model = tiny_model(name)
    (batch,) = inputs(name, 1)
    before = first_output(model, batch)
    head = head_name(model)
    with linearized(model):
        groups = smoothing_groups(model)
        consumers = [name for group in groups for name in group.consumers]
        assert sorted(consumers) == sorted(quantizable_linears(model))
        at_run_time = {
            " ".join(starred(consumer.removeprefix(f"{group.block}.")) for consumer in names)
            for group in groups
            if group.producer is None and (names := group.consumers) != (head,)
        }
        assert at_run_time == EXPECTED[name].at_run_time
        scales = random_scales(groups)
        assert len(scales) == EXPECTED[name].folds
        assert proven(model, scales, name) == {}
        apply_folds(model, scales)
    # Every product is rounded to 2^-24 relative; two layers of sums up to 128 long amplify that by
    # far less than the 2^10 allowed here, and a missed consumer moves the output by its own size.
    torch.testing.assert_close(
        first_output(model, batch), before, rtol=0, atol=2.0**-14 * float(before.abs().max())
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_runs_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    data = inputs(name)
    with linearized(model):
        # Exact: outliers 32 times larger in two channels of whatever a fold reaches.
        planted = random_scales(smoothing_groups(model))
        for s in planted.values():
            s.fill_(1.0)[[1, 5]] = 2.0**-5
        apply_folds(model, planted)
        linears = set(quantizable_linears(model))
    before = first_output(model, data[0])
    found = calibrate(model, data)

    def error(quantized: nn.Module) -> float:
        return float((first_output(quantized, data[0]) - before).norm() / before.norm())

    for scheme in ("O1", "O2", "O3"):
        quantized: Any = quantize(copy.deepcopy(model), found, scheme=scheme)
        record = quantized.sq_cpu_config
        other = {n for n, reason in record.kept.items() if reason.startswith("a matrix of a ")}
        assert {matrix_name(n) for n in other} <= EXPECTED[name].matrices
        kept = {n: reason for n, reason in record.kept.items() if n not in other}
        head = [n for n in linears if n == head_name(model) or n.startswith("lm_head.")]
        assert kept == dict.fromkeys(head, "ignored")
        assert {*record.layers, *kept} == linears
        assert sum(group.fold for group in record.plan.groups) == EXPECTED[name].folds
        assert all(isinstance(quantized.get_submodule(n), QuantLinear) for n in record.layers)
        left = {
            matrix_name(n)
            for n, p in quantized.named_parameters()
            if p.dim() > 1 and not n.startswith("lm_head.dense.")
        }
        assert left == EXPECTED[name].matrices
        loaded = sq_cpu.load(sq_cpu.save(quantized, tmp_path / scheme))
        assert_same_model(loaded, quantized, lambda model: first_output(model, data[0]))
    naive = quantize(copy.deepcopy(model), found, scheme="O3", smooth=False)
    assert error(quantized) < error(naive) / 4


# --- what a row resolves to ---------------------------------------------------------------------


def test_base_models_and_other_heads_resolve_too() -> None:
    model = tiny_model("llama")
    whole, base = smoothing_groups(model), smoothing_groups(model.model)
    assert [g.name for g in whole[:-1]] == [f"model.{g.name}" for g in base]
    assert whole[-1].consumers == ("lm_head",)


def test_grouped_query_heads_share_their_scale() -> None:
    groups = smoothing_groups(tiny_model("llama"))
    value = next(g for g in groups if g.name.endswith("v_proj")).layout
    assert (value.channels, value.kv_heads, value.repeats) == (24, 2, 2)
    falcon = tiny_model("falcon-new")
    linearize(falcon)
    fused = next(g for g in smoothing_groups(falcon) if g.name.endswith("value"))
    # Two of [q, q, k, v], 8 channels each.
    layout = fused.layout
    assert (layout.parts, layout.start, layout.stop, layout.repeats) == (2, 24, 32, 2)
    s = torch.arange(1.0, 17.0)
    assert layout.spread(s, 64).reshape(2, 4, 8)[:, :3].eq(1).all()
    assert layout.spread(s, 64).reshape(2, 4, 8)[:, 3].flatten().equal(s)


def test_an_unmet_condition_is_the_reason_in_the_plan() -> None:
    groups = smoothing_groups(tiny_model("opt-350m"))
    block = [g for g in groups if g.block == "model.decoder.layers.1"]
    reasons = {g.consumers[0].rpartition(".")[2]: g.reason for g in block}
    condition = "do_layer_norm_before is False, and the fold needs True"
    assert reasons == {"q_proj": condition, "out_proj": "", "fc1": condition, "fc2": ""}
    clipped = tiny_model("mpt-clipped")
    assert "attn_config.clip_qkv is 100.0, and the fold needs None" in {
        g.reason for g in smoothing_groups(clipped)
    }


def test_what_shares_an_input_shares_its_scale() -> None:
    model = tiny_model("olmo2")
    data = inputs("olmo2")
    found = calibrate(model, data)
    scales = fold(model, SmoothPlan.uniform(model, found), found).scales
    names = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]
    assert all(torch.equal(scales[names[0]], scales[name]) for name in names[1:])


def test_a_group_needs_consumers() -> None:
    with pytest.raises(SqCpuError, match="group norm: needs consumers"):
        Group(producer="norm", consumers=())
    with pytest.raises(SqCpuError, match="takes a Family, not a dict"):
        register_family({})  # type: ignore[arg-type]


# --- a user's own family ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.key_value = nn.Linear(16, 32)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.key_value(self.norm(x)).chunk(2, dim=-1)
        result: Tensor = x + self.out(torch.sigmoid(gate) * value)
        return result


class MyMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


def test_a_new_family_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", list(FAMILIES))
    torch.manual_seed(0)
    model = MyMixer().eval()
    assert all(g.reason == "no family row for 'MyMixer'" for g in smoothing_groups(model))

    groups = (
        Group(producer="norm", consumers=("key_value",)),
        Group(producer="key_value", consumers=("out",), rows="second_half"),
    )
    stacks = (Stack(blocks="blocks", groups=groups),)
    register_family(Family(model_types=("MyMixer",), stacks=stacks))
    assert family_of(model) is families.FAMILIES[0]

    x = torch.randn(2, 5, 16)
    data = [torch.randn(4, 9, 16) for _ in range(3)]
    found = calibrate(model, data, ignore=("head",))
    smoothed = copy.deepcopy(model)
    done = fold(smoothed, SmoothPlan.uniform(model, found, ignore=("head",)), found)
    assert [group.fold for group in done.plan.groups] == [True] * 6
    torch.testing.assert_close(smoothed(x), model(x))

    before = model(x)
    quantize(model, found, scheme=sq_cpu.Scheme(ignore=("head",)))
    record: Any = model.sq_cpu_config
    assert len(record.layers) == 6
    assert record.kept == {"head": "ignored"}
    assert (model(x) - before).norm() < 0.02 * before.norm()
