"""Which models become programs, and that a row that does not fit is found out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import inputs, tiny_model

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.inference import lowering
from sq_cpu.inference.lowering import compile_program
from sq_cpu.inference.program import Attend, Embed, Merge, Project
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Decoder

# fmt: off
PROGRAMS = [
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi", "phi-relu", "phi3", "glm", "glm4",
    "gemma", "gemma2", "gemma3_text", "stablelm",
]
# fmt: on


def quantized(
    name: str,
    scheme: str = "O1",
    dtype: Any = torch.float32,
    head: Any = "float",
    **config: Any,
) -> Any:
    model = tiny_model(name, dtype=dtype, **config).eval()
    calibration = sq_cpu.calibrate(model, inputs(name), progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, head=head, progress=False)


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_families(name: str, scheme: str) -> None:
    model = quantized(name, scheme)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = compile_program(model)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(program.cache_shapes) == layers
    assert sum(isinstance(stage, Attend) for stage in program.stages) == layers
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_dtype_stays(dtype: torch.dtype) -> None:
    model = quantized("qwen3", dtype=dtype)
    norm = model.model.layers[0].input_layernorm.weight
    compile_program(model)
    assert norm.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.dtype == dtype


def test_merged_norms_are_stages_of_their_own() -> None:
    program = compile_program(quantized("gemma2"))
    assert sum(isinstance(stage, Merge) for stage in program.stages) == 2 * len(
        program.cache_shapes
    )
    attends = [stage for stage in program.stages if isinstance(stage, Attend)]
    assert {stage.options.window > 0 for stage in attends} == {False, True}
    assert all(stage.options.softcap > 0 for stage in attends)


def test_attention_and_mlp_side_by_side() -> None:
    compile_program(quantized("stablelm-parallel", qk_layernorm=False))
    with pytest.raises(SqCpuError, match="does something else"):  # a norm of each head
        compile_program(quantized("stablelm-parallel", qk_layernorm=True))


def test_float_channels() -> None:
    """Layers whose outliers stay in float, where nothing follows but the residual."""
    model = tiny_model("llama").eval()
    calibration = sq_cpu.calibrate(model, inputs("llama"), progress=False)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, 0.5)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    layers = tuple(sq_cpu.LayerPlan(name=name, outliers=(1, 7)) for name in names)
    sq_cpu.quantize(model, calibration, replace(plan, layers=layers), progress=False)
    program = compile_program(model)
    linears = [x for stage in program.stages if isinstance(stage, Project) for x in stage.linears]
    assert sum(linear.float_columns is not None for linear in linears) == 2


# Rows that claim something else than the model does.
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs of the rotary embedding": ("llama", {"interleaved": True}),
    "no norm before attention": ("llama", {"attention_norm": None}),
    "the other norm": ("llama", {"mlp_norm": "input_layernorm"}),
    "no norm of queries": ("qwen3", {"q_norm": "self_attn.nothing"}),
    "no norm after attention": ("gemma2", {"after_attention": None}),
    "a norm too many": ("llama", {"after_mlp": "post_attention_layernorm"}),
    "gate and up": ("llama", {"gate_up": ("mlp.up_proj", "mlp.gate_proj")}),
    "q and k": (
        "qwen2",
        {"qkv": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj")},
    ),
    "parallel": ("llama", {"parallel": True}),
    "no rotary": ("llama", {"rotary": "nothing"}),
    "not gated": ("llama", {"gated": False, "gate_up": ("mlp.up_proj",)}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rows_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = WRONG[wrong]
    model = quantized(name)
    # Norms of ones would prove nothing.
    norms = (module for module in model.modules() if "Norm" in type(module).__name__)
    for i, norm in enumerate(norms):
        norm.weight.data.copy_(torch.linspace(0.5, 2.0, len(norm.weight)).roll(i))
    compile_program(model)
    family = family_of(model)
    assert family is not None
    assert family.decoder is not None
    row = replace(family, decoder=replace(family.decoder, **change))
    monkeypatch.setattr(lowering, "family_of", lambda _: row)
    with pytest.raises(SqCpuError, match=r"layers\.0 does something else than its row says"):
        compile_program(model)


def test_a_norms_offset_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("gemma")
    family = family_of(model)
    assert family is not None
    stack = replace(family.stacks[0], norm_offset=0.0)
    monkeypatch.setattr(lowering, "family_of", lambda _: replace(family, stacks=(stack,)))
    with pytest.raises(SqCpuError, match="does something else"):
        compile_program(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
def test_int8_heads(name: str, tied: bool) -> None:
    model = quantized(name, head="int8", tie_word_embeddings=tied)
    program = compile_program(model)
    embed = program.stages[0]
    assert isinstance(embed, Embed)
    assert isinstance(embed.table, sq_cpu.QuantLinear) == tied


def test_reasons() -> None:
    with pytest.raises(SqCpuError, match="not a model of transformers"):
        compile_program(torch.nn.Linear(2, 2))
    with pytest.raises(SqCpuError, match="gpt2: its family has no decoder row"):
        compile_program(quantized("gpt2"))
    with pytest.raises(SqCpuError, match="q_proj is a Linear, not in int8"):
        compile_program(tiny_model("llama").eval())
    with pytest.raises(SqCpuError, match="scale per tensor would depend on the other rows"):
        compile_program(quantized("llama", "O2"))
    model = quantized("llama")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(SqCpuError, match=r"mlp\.down_proj has hooks"):
        compile_program(model)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(SqCpuError, match="depend on the sequence's length"):
        compile_program(quantized("llama", rope_parameters=rope))


def test_the_models_attention_stays_what_it_was() -> None:
    model = quantized("llama")
    before = model.config._attn_implementation
    compile_program(model)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())
    assert Decoder() == Decoder()
