"""What an int8 cache costs layer by layer, and the layers that get bf16 for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor

import sq_cpu
from sq_cpu import SqCpuError, measure_kv
from sq_cpu.inference.kv_kinds import kv_kinds


def spoiled() -> Any:
    """Return a model whose keys have a huge channel pair in layer 1: q has it as much smaller."""
    model = tiny_model("llama", attention_bias=False)
    attention = model.model.layers[1].self_attn
    half = attention.head_dim // 2
    with torch.no_grad():
        for linear, factor in ((attention.k_proj, 2.0**14), (attention.q_proj, 2.0**-14)):
            heads = linear.weight.view(-1, attention.head_dim, linear.in_features)
            heads[:, [1, 1 + half]] *= factor
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(batches()[0]).logits  # type: ignore[no-any-return]


def test_planted_outliers_need_bf16_in_their_layer_alone() -> None:
    model = spoiled()
    before = logits(model)
    report = measure_kv(model, batches())
    assert report.int8 > 1e-2
    assert report.kv == {1: "bf16"}
    assert report.chosen < 1e-4
    assert report.by_layer[1] > 100 * report.by_layer[0]
    assert report.to_dict()["kv"] == {"1": "bf16"}
    # The model is as it was.
    assert torch.equal(logits(model), before)
    assert kv_kinds(model.config, 2) == ["int8", "int8"]

    sq_cpu.use_int8_attention(model)
    error = (logits(model) - before).norm()
    sq_cpu.use_int8_attention(model, kv=json.loads(json.dumps(report.to_dict()))["kv"])
    assert kv_kinds(model.config, 2) == ["int8", "bf16"]
    assert (logits(model) - before).norm() < error / 10


def test_a_model_that_int8_does_not_spoil_keeps_it() -> None:
    model = tiny_model("llama")
    sq_cpu.use_int8_attention(model, kv={0: "bf16"})
    expected = logits(model)
    report = measure_kv(model, batches())
    assert report.kv == {}
    assert report.chosen == report.int8 > 0
    assert all(kl > 0 for kl in report.by_layer.values())
    # What was in use is again.
    assert torch.equal(logits(model), expected)
    assert kv_kinds(model.config, 2) == ["bf16", "int8"]


@pytest.mark.parametrize("hooked", [False, True])
def test_the_reference_is_in_floats_whatever_attention_the_model_has(hooked: bool) -> None:
    expected = measure_kv(tiny_model("llama"), batches())
    model = tiny_model("llama")
    model.set_attn_implementation("sq_cpu")
    if hooked:
        sq_cpu.use_int8_attention(model)
    hooks = dict(model._forward_pre_hooks)
    report = measure_kv(model, batches())
    assert report.int8 == pytest.approx(expected.int8, rel=1e-2)
    assert report.by_layer == pytest.approx(expected.by_layer, rel=1e-2)
    # The model is as it was, its config too.
    assert model.config._attn_implementation == "sq_cpu"
    assert dict(model._forward_pre_hooks) == hooks
    assert not hasattr(model.config, "sq_cpu_bf16_kv_layers")


def test_tokens_that_the_model_forbids_count_nothing_and_nan_is_refused() -> None:
    model = tiny_model("llama")

    def replaced(value: float) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return output.index_fill(2, torch.tensor([3]), value)

        return model.lm_head.register_forward_hook(hook)

    handle = replaced(-1e9)
    expected = measure_kv(model, batches())
    handle.remove()
    handle = replaced(-torch.inf)
    assert measure_kv(model, batches()) == expected
    handle.remove()
    replaced(torch.nan)
    with pytest.raises(SqCpuError, match="logits have NaN or Inf"):
        measure_kv(model, batches())
    assert model.config._attn_implementation != "sq_cpu"
    assert not model._forward_pre_hooks


def test_padding_is_left_out() -> None:
    model = tiny_model("llama")
    ids = batches()[0]
    expected = measure_kv(model, [ids[:, 4:]])
    padded = torch.cat([torch.zeros_like(ids).repeat(1, 2), ids[:, 4:]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :32] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    report = measure_kv(model, [batch])
    assert report.int8 == pytest.approx(expected.int8, rel=1e-2)
    assert report.by_layer == pytest.approx(expected.by_layer, rel=1e-2)
    with pytest.raises(SqCpuError, match="padding alone"):
        measure_kv(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])


def test_refused() -> None:
    with pytest.raises(SqCpuError, match="a divergence is at least 0"):
        measure_kv(tiny_model("llama"), batches(), most=-1.0)
    with pytest.raises(SqCpuError, match="no model of transformers"):
        measure_kv(torch.nn.Linear(2, 2), batches())
    with pytest.raises(SqCpuError, match="gives no logits"):
        measure_kv(tiny_model("llama").model, batches())
    fused = tiny_model("llama")
    sq_cpu.fuse(sq_cpu.quantize(fused, sq_cpu.calibrate(fused, batches())))
    with pytest.raises(SqCpuError, match="the model is fused"):
        measure_kv(fused, batches())
