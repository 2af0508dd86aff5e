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
from sq_cpu.inference.fusing import fuse
from sq_cpu.inference.lowering import compile_program
from sq_cpu.inference.stages import (
    Add,
    Attend,
    Embed,
    Merge,
    Normalize,
    Positions,
    Project,
    Route,
)
from sq_cpu.models import bases
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Decoder, Mixture

# fmt: off
PROGRAMS = [
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi", "phi-relu", "phi3", "glm", "glm4",
    "gemma", "gemma2", "gemma3_text", "stablelm", "granite", "olmo2", "gpt2", "opt", "gpt_neox",
    "gpt_neox-sequential", "bloom", "falcon", "falcon-new", "falcon-new_one_norm", "mpt", "gptj",
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
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


FLOAT = {
    "q": ("llama", ("self_attn.q_proj",)),
    "up": ("qwen2", ("mlp.up_proj",)),
    "gate": ("qwen2", ("mlp.gate_proj",)),
    "out": ("gemma2", ("self_attn.o_proj", "mlp.down_proj")),
    "fused": ("phi3", ("mlp.gate_up_proj", "self_attn.qkv_proj")),
    "Conv1D": ("gpt2", ("attn.c_attn", "mlp.c_proj")),
    "subclass": ("falcon", ("self_attention.query_key_value",)),
}


def partly_quantized(name: str, ends: tuple[str, ...], dtype: Any = torch.float32) -> Any:
    """Return a quantized model whose linears of these names stay in float, in the first block."""
    model = tiny_model(name, dtype=dtype).eval()
    calibration = sq_cpu.calibrate(model, inputs(name), progress=False)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, 0.5)
    layers = tuple(
        sq_cpu.LayerPlan(name=full, in_float=True)
        for full, _ in model.named_modules()
        if full.endswith(ends) and ".0." in full
    )
    plan = replace(plan, layers=layers)
    return sq_cpu.quantize(model, calibration, plan, head="float", progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", FLOAT)
def test_linears_in_float(what: str, dtype: torch.dtype) -> None:
    program = compile_program(partly_quantized(*FLOAT[what], dtype))
    layers = [x.layer for s in program.stages if isinstance(s, Project) for x in s.linears]
    floats = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert 0 < len(floats) < len(layers)
    assert all(layer.weight.dtype == dtype for layer in floats)


def test_quantizers_that_differ_beside_one_another() -> None:
    model = tiny_model("llama").eval()
    calibration = sq_cpu.calibrate(model, inputs("llama"), progress=False)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, 0.5)
    layers = tuple(
        sq_cpu.LayerPlan(name=f"model.layers.{i}.{name}", activations="static")
        for i, name in enumerate(("self_attn.k_proj", "mlp.gate_proj"))
    )
    sq_cpu.quantize(model, calibration, replace(plan, layers=layers), progress=False)
    compile_program(model)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("mpt", {"attn_config": {"softmax_scale": 0.3}}),
        ("gptj", {"rotary_dim": 8}),
        ("falcon", {"bias": False}),
    ],
)
def test_what_configs_change(name: str, config: dict[str, Any]) -> None:
    compile_program(quantized(name, **config))


def test_where_stages_lie() -> None:
    """Norms of whole rows, norms of what enters, and learned positions have stages of their own."""
    counts = {
        name: [
            sum(isinstance(stage, kind) for stage in compile_program(quantized(name)).stages)
            for kind in (Normalize, Positions)
        ]
        for name in ("olmo2", "bloom", "gpt2", "qwen3")
    }
    assert counts == {"olmo2": [4, 0], "bloom": [1, 0], "gpt2": [0, 1], "qwen3": [0, 0]}


@pytest.mark.parametrize(
    ("name", "config", "top", "renormalize", "shared"),
    [
        ("mixtral", {}, 3, True, 0),
        ("olmoe", {}, 3, False, 0),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 2}, 2, False, 0),
        ("qwen3_moe", {"norm_topk_prob": True}, 3, True, 0),
        ("qwen2_moe", {}, 3, False, 1),
    ],
)
def test_mixtures(
    name: str, config: dict[str, Any], top: int, renormalize: bool, shared: int
) -> None:
    stages = compile_program(quantized(name, **config)).stages
    routes = [stage for stage in stages if isinstance(stage, Route)]
    assert len(routes) == (1 if "qwen" in name else 2)  # these have a first block without experts
    assert all((route.top, route.renormalize) == (top, renormalize) for route in routes)
    adds = [stage for stage in stages if isinstance(stage, Add)]
    assert len(adds) == len(routes) * (5 + shared)
    assert sum(stage.gate is not None for stage in adds) == shared


def test_experts_that_differ() -> None:
    """Some experts' linears in float, or with channels in float, or static scales."""
    model = tiny_model("mixtral").eval()
    calibration = sq_cpu.calibrate(model, inputs("mixtral"), progress=False)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, 0.5)
    at = "model.layers.0.mlp.experts"
    layers = (
        sq_cpu.LayerPlan(name=f"{at}.0.down_proj", in_float=True),
        sq_cpu.LayerPlan(name=f"{at}.1.gate_up_proj", in_float=True),
        sq_cpu.LayerPlan(name=f"{at}.2.gate_up_proj", activations="static"),
        sq_cpu.LayerPlan(name=f"{at}.3.down_proj", outliers=(1, 5)),
    )
    sq_cpu.quantize(model, calibration, replace(plan, layers=layers), progress=False)
    with torch.no_grad():
        ids = inputs("mixtral")[0]["input_ids"]
        plain = model(ids).logits
        fuse(model)
        made = model(ids).logits
    assert not torch.equal(made, plain)
    assert (made - plain).norm() / plain.norm() < 0.08


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_slopes_are_seen(name: str) -> None:
    attends = [x for x in compile_program(quantized(name)).stages if isinstance(x, Attend)]
    for stage in attends:
        assert stage.options.slopes is not None
        assert torch.equal(stage.options.slopes, 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0]))
        assert stage.rotary is None


HEADS: dict[str, tuple[dict[str, float], float, float]] = {
    "llama": ({}, 1.0, 0.0),
    "gemma2": ({"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "granite": ({"logits_scaling": 8.0, "embedding_multiplier": 3.0}, 0.125, 0.0),
    "gpt2": ({}, 1.0, 0.0),
    "opt": ({}, 1.0, 0.0),
}


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_seen(name: str, kind: str) -> None:
    config, multiplier, softcap = HEADS[name]
    program = compile_program(quantized(name, head=kind, **config))
    assert program.head is not None
    assert program.head.multiplier == pytest.approx(multiplier, rel=1e-5)
    assert program.head.softcap == softcap
    assert isinstance(program.head.layer, torch.nn.Linear) == (kind == "float")


def test_logits_that_are_no_head_alone() -> None:
    model = quantized("llama")
    model.lm_head.register_forward_hook(lambda _, args, output: output.sin())
    assert compile_program(model).head is None


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
    "multiplier": ("granite", {"residual_multiplier": "nothing"}),
    "no norm of whole rows": ("olmo2", {"k_norm": "self_attn.nothing"}),
    "a norm before attention": ("olmo2", {"attention_norm": "post_attention_layernorm"}),
    "qkv together": ("gpt_neox", {"qkv_by_head": False}),
    "qkv by head": ("gpt2", {"qkv_by_head": True}),
    "sequential": ("gpt_neox", {"parallel": False}),
    "no biases of scores": ("bloom", {"alibi": None}),
    "scale": ("mpt", {"scale": "attn.head_dim"}),
    "pairs of a table": ("gptj", {"interleaved": False}),
    "scale of queries": ("opt", {"scale": None}),
    "activation": ("bloom", {"activation": "relu"}),
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
    blocks = rf"{family.decoder.blocks}\.0 does something else than its row says"
    with pytest.raises(SqCpuError, match=blocks):
        compile_program(model)


# The same of what is before the blocks, and after them.
WRONG_ENDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no positions": ("gpt2", {"positions": None}, "wte does something else"),
    "no norm of what enters": ("bloom", {"embedding_norm": None}, "word_embeddings does something"),
    "final norm": ("llama", {"final_norm": "layers.0.input_layernorm"}, "input_layernorm does"),
    "no final norm": ("llama", {"final_norm": "nothing"}, "nothing does something else"),
    "blocks": ("opt", {"base": None}, "the model has no layers"),
    "gate": (
        "mixtral",
        {"mixture": Mixture(gate_up=("gate_up_proj", "gate_up_proj"))},
        r"\[96, 32\] does not fit between residual of 32 and expert raised of 48",
    ),
    "down": (
        "llama",
        {"down": "self_attn.q_proj"},
        r"\[48, 32\] does not fit between residual of 32 and hidden",
    ),
    "own attention": ("gptj", {"own_attention": False}, "does not attend through"),
}


@pytest.mark.parametrize("wrong", WRONG_ENDS)
def test_wrong_ends_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, message = WRONG_ENDS[wrong]
    model = quantized(name)
    family = family_of(model)
    assert family is not None
    assert family.decoder is not None
    row = replace(family, decoder=replace(family.decoder, **change))
    monkeypatch.setattr(lowering, "family_of", lambda _: row)
    monkeypatch.setattr(bases, "family_of", lambda _: row)
    with pytest.raises(SqCpuError, match=message):
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
    with pytest.raises(SqCpuError, match="deepseek_v3: its family has no decoder row"):
        compile_program(quantized("deepseek_v3"))
    with pytest.raises(SqCpuError, match="none of its linears is in int8"):
        compile_program(tiny_model("llama").eval())
    with pytest.raises(SqCpuError, match=r"config\.attn_config\.clip_qkv is 100\.0"):
        compile_program(quantized("mpt-clipped"))
    with pytest.raises(SqCpuError, match=r"config\.clip_qkv is 2\.0"):
        compile_program(quantized("olmoe", clip_qkv=2.0))
    with pytest.raises(SqCpuError, match=r"config\.alibi is True"):
        compile_program(quantized("falcon-rw"))
    with pytest.raises(SqCpuError, match="residual of 24, 32"):
        compile_program(quantized("opt-350m"))
    with pytest.raises(SqCpuError, match=r"h\.0 does something else"):
        compile_program(quantized("bloom-postnorm"))
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
