"""What vLLM can serve of our models, as far as that is known without it."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer
from tiny import tiny_model

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, SqCpuError
from sq_cpu.smoothing.plan import LayerPlan
from sq_cpu.vllm_plugin import register
from sq_cpu.vllm_plugin.served import check_model_type, columns_here, read_linears

BLOCK = "model.layers.0"
QKV = [f"{BLOCK}.self_attn.{name}_proj" for name in "qkv"]


def saved(folder: Path, *, plan: SmoothPlan | None = None, **options: Any) -> dict[str, Any]:
    """Return the quantization_config that is stored of a tiny model."""
    model = byte_model()
    if plan is not None:
        options["plan"] = plan
    sq_cpu.save(sq_cpu.quantize(model, **options), folder, byte_tokenizer())
    content = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = content["quantization_config"]
    return found


def test_the_linears_of_a_folder(tmp_path: Path) -> None:
    linears = read_linears(saved(tmp_path, scheme="O1", smooth=False))
    kind = linears.of(QKV)
    assert kind is not None
    assert not kind.is_static
    assert kind.hadamard == 0
    assert not kind.smoothed
    assert linears.of(["lm_head"]) is None
    assert linears.below(BLOCK) == QKV[0]
    assert linears.below("model.layers.00") is None


def test_other_names(tmp_path: Path) -> None:
    linears = read_linears(saved(tmp_path, scheme="O1", smooth=False))
    renamed = linears.renamed({QKV[0]: "q"})
    assert renamed.of(["q"]) == linears.of(QKV[:1])
    assert renamed.of(QKV[:1]) is None


@pytest.mark.parametrize(
    "planned",
    [{"in_float": True}, {"activations": "per_token_x2"}, {"smoothing": (2.0,) * 32}],
    ids=["float", "activations", "smoothing"],
)
def test_linears_side_by_side_are_alike(tmp_path: Path, planned: dict[str, Any]) -> None:
    plan = SmoothPlan((), (LayerPlan(name=QKV[2], **planned),), Scheme())
    linears = read_linears(saved(tmp_path, plan=plan))
    with pytest.raises(SqCpuError, match=r"v_proj is not quantized as .*q_proj is; quantize with"):
        linears.of(QKV)


def test_granularity_of_weights_may_differ() -> None:
    linears = read_linears(settings())
    kind = linears.kinds["a"]
    rows = replace(kind, scheme=replace(kind.scheme, weights="per_tensor"))
    assert replace(linears, kinds={"a": kind, "b": rows}).of(["a", "b"]) == kind


def settings(**record: Any) -> dict[str, Any]:
    """Return what config.json says of a model of one linear."""
    return {
        "quant_method": "sq_cpu",
        "format_version": 9,
        "scheme": Scheme().to_dict(),
        "plan": None,
        "layers": ["a"],
    } | record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"scheme": Scheme.of("O2").to_dict()}, r"\(a\): O2 .* several requests; quantize with O1"),
        ({"prefix": [5]}, r"\(5\): a prefix of 1 tokens"),
        ({"decomposed": {"a": 3}}, r"\(a\): channels in float"),
        ({"layers": ["a", "lm_head"]}, r"\(lm_head\): an int8 head"),
        ({"embeddings": {"embed": "a"}}, r"\(a\): an int8 head"),
        ({"kept": {"mlp.experts.0.up": "ignored"}}, r"\(mlp.experts.0.up\): experts"),
        ({"dtypes": {"a": "float32"}}, r"\(a\): linears that compute in a dtype of their own"),
        ({"format_version": 4}, "format_version 4 .* save it again"),
        ({"format_version": 10}, "format_version 10 is newer"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
    ],
)
def test_what_vllm_cannot_serve(record: dict[str, Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=message):
        read_linears(settings(**record))


def test_a_rotation_is_not_cut() -> None:
    kind = replace(read_linears(settings()).kinds["a"], hadamard=64)
    assert columns_here(kind, "a", 100, 100) == 128
    assert columns_here(kind, "a", 128, 256) == 128
    with pytest.raises(SqCpuError, match=r"a rotates .* gives 96 of 192 to a rank; take another"):
        columns_here(kind, "a", 96, 192)
    assert columns_here(replace(kind, hadamard=0), "a", 96, 192) == 96


def test_models_that_vllm_transposes() -> None:
    check_model_type("llama")
    model_type = tiny_model("gpt2").config.model_type
    with pytest.raises(SqCpuError, match="vLLM transposes the weights of gpt2"):
        check_model_type(model_type)


def test_without_vllm_a_line_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING):
        register()
    [line] = caplog.messages
    assert "sq_cpu does not serve in this vLLM" in line
    assert "\n" not in line
