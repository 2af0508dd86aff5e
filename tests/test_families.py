"""Family rows: groups resolve to the right modules and shapes, or raise."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.families import (
    FAMILIES,
    SmoothingGroup,
    check_ignore,
    quantizable_linears,
    smoothing_groups,
)

TYPES = [name for family in FAMILIES for name in family.model_types]


@pytest.mark.parametrize("model_type", TYPES)
def test_every_linear_but_the_head_is_in_one_group(model_type: str) -> None:
    model = tiny_model(model_type)
    consumers = [name for group in smoothing_groups(model) for name in group.consumers]
    assert sorted(consumers) == sorted(quantizable_linears(model, ("lm_head",)))


def test_base_models_resolve_too() -> None:
    model = tiny_model("llama")
    whole, base = smoothing_groups(model), smoothing_groups(model.model)
    assert [group.name for group in whole] == [f"model.{group.name}" for group in base]


def test_grouped_query_heads_share_their_scale() -> None:
    value = next(g for g in smoothing_groups(tiny_model("llama")) if "v_proj" in g.producer)
    assert (value.channels, value.kv_heads, value.repeats) == (24, 2, 2)
    group = SmoothingGroup("v", ("o",), channels=4, kv_heads=2, repeats=2)
    # Query heads 0, 1 read key-value head 0 and heads 2, 3 read head 1; two channels each.
    absmax = torch.tensor([1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert group.narrow(absmax).tolist() == [2, 8, 4, 6]
    assert group.widen(torch.tensor([2.0, 8, 4, 6])).tolist() == [2, 8, 2, 8, 4, 6, 4, 6]


def test_unknown_models_are_refused() -> None:
    with pytest.raises(SqCpuError, match=r"type 'gemma': known are llama, .*opt; .*smooth=False"):
        smoothing_groups(tiny_model("gemma"))
    with pytest.raises(SqCpuError, match="type 'Linear'"):
        smoothing_groups(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("attribute", "value"), [("do_layer_norm_before", False), ("activation_function", "gelu")]
)
def test_unmet_requirements_are_refused(attribute: str, value: object) -> None:
    model = tiny_model("opt", **{attribute: value})
    with pytest.raises(SqCpuError, match=f"has {attribute}={value!r} and the fold needs"):
        smoothing_groups(model)


def test_missing_modules_and_wrong_shapes_are_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(SqCpuError, match=r"no module 'model\.layers\.1\.mlp\.up_proj'"):
        smoothing_groups(model)

    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(47, 32)
    with pytest.raises(SqCpuError, match=r"down_proj has 47 input channels.* the 48 output"):
        smoothing_groups(model)

    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(SqCpuError, match="down_proj is a Identity, not a Linear"):
        smoothing_groups(model)

    model = tiny_model("llama")
    model.model.layers[0].input_layernorm = nn.Identity()
    with pytest.raises(SqCpuError, match="input_layernorm has no weight"):
        smoothing_groups(model)


def test_linears_are_ignored_by_full_name_or_its_end() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    model["block"] = nn.ModuleDict({"head": nn.Linear(2, 2)})
    assert list(quantizable_linears(model)) == ["head", "lm_head", "block.head"]
    assert list(quantizable_linears(model, ("head",))) == ["lm_head"]
    assert list(quantizable_linears(model, ("block.head",))) == ["head", "lm_head"]


def test_an_ignored_name_must_exist() -> None:
    model = tiny_model("llama")
    check_ignore(model, ("lm_head", "down_proj", "self_attn.q_proj"))
    check_ignore(model.model, ("lm_head",))  # the default, for models without a head too
    with pytest.raises(SqCpuError, match="'dwn_proj', which matches no linear: use down_proj"):
        check_ignore(model, ("lm_head", "dwn_proj"))
    with pytest.raises(SqCpuError, match=r"'attn\.q_proj', .*use self_attn\.q_proj or "):
        check_ignore(model, ("attn.q_proj",))
    with pytest.raises(SqCpuError, match=r"'1234', .*use the end of a linear's name"):
        check_ignore(model, ("1234",))


def test_attention_that_reads_weights_directly_is_not_quantizable() -> None:
    assert quantizable_linears(nn.MultiheadAttention(4, 2)) == {}
