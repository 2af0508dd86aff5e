"""One model's weights as other model types, exactly, and outliers planted exactly.

A re-hosted model computes the same function; its linears are fused, permuted or repeated as the
model type has them. So one set of real weights, with real outliers, stands for many families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sq_cpu.errors import SqCpuError

State = dict[str, Tensor]

_CARRIED = (  # what the configs of all these model types call the same
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _keep(_: Any, block: State) -> State:
    return block


def _zero_biases(_: Any, block: State) -> State:
    names = [f"self_attn.{letter}_proj" for letter in "qkv"]
    zeros = {f"{name}.bias": torch.zeros(len(block[f"{name}.weight"])) for name in names}
    return block | zeros


def _fuse(block: State, fused: str, parts: Sequence[str]) -> State:
    rest = dict(block)
    return rest | {fused: torch.cat([rest.pop(part) for part in parts])}


def _fuse_gate_up(_: Any, block: State) -> State:
    gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    return _fuse(block, "mlp.gate_up_proj.weight", gate_up)


def _fuse_all(config: Any, block: State) -> State:
    qkv = [f"self_attn.{letter}_proj.weight" for letter in "qkv"]
    return _fuse(_fuse_gate_up(config, block), "self_attn.qkv_proj.weight", qkv)


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Bring row i + head_dim / 2 of every head behind row i."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _glm(config: Any, block: State) -> State:
    # GLM rotates the neighbours 2 i and 2 i + 1 where LLaMA rotates i and i + h/2.
    for letter in "qk":
        name = f"self_attn.{letter}_proj.weight"
        block = block | {name: _interleave(block[name], config.head_dim)}
    return _fuse_gate_up(config, block)


def _experts(config: Any, block: State) -> State:
    """Two identical experts that share every token half and half."""
    block = _fuse_gate_up(config, block)
    gate_up, down = block.pop("mlp.gate_up_proj.weight"), block.pop("mlp.down_proj.weight")
    return block | {
        "mlp.gate.weight": torch.zeros(2, config.hidden_size),
        "mlp.experts.gate_up_proj": torch.stack([gate_up, gate_up]),
        "mlp.experts.down_proj": torch.stack([down, down]),
    }


@dataclass(frozen=True)
class _Host:
    block: Callable[[Any, State], State] = _keep
    """(LLaMA's config, a LLaMA block's tensors) -> the host's tensors of the block."""
    config: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    query_scale: str | None = None
    """The config's field that holds what LLaMA fixes at head_dim ** -0.5."""


_HOSTS = {
    "mistral": _Host(config={"sliding_window": None}),
    "qwen2": _Host(_zero_biases),
    "phi3": _Host(_fuse_all, rope={"partial_rotary_factor": 1.0}),
    "glm": _Host(_glm, {"attention_bias": False}, {"partial_rotary_factor": 1.0}),
    "granite": _Host(
        config={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
        query_scale="attention_multiplier",
    ),
    "mixtral": _Host(_experts, {"num_local_experts": 2, "num_experts_per_tok": 2}),
}
HOSTS = tuple(_HOSTS)


def rehost(llama: nn.Module, model_type: str) -> nn.Module:
    """Return a new model of `model_type`, one of HOSTS, that computes what `llama` does.

    Raises `SqCpuError` when `llama` is not a LlamaForCausalLM without biases.
    """
    config: Any = llama.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise SqCpuError(f"rehost takes a llama model without biases, not a {config.model_type}")
    host = _HOSTS[model_type]
    settings = {name: getattr(config, name) for name in _CARRIED} | dict(host.config)
    settings["rope_parameters"] = {**config.rope_parameters, **host.rope}
    if host.query_scale:
        settings[host.query_scale] = config.head_dim**-0.5
    model: nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings)
    )

    state: State = {}
    blocks: dict[str, State] = {}
    for name, tensor in llama.state_dict().items():
        head, layers, rest = name.partition("model.layers.")
        if layers and not head:
            index, _, inner = rest.partition(".")
            blocks.setdefault(f"{layers}{index}.", {})[inner] = tensor
        else:
            state[name] = tensor
    for prefix, block in blocks.items():
        state |= {prefix + name: tensor for name, tensor in host.block(config, block).items()}
    model.load_state_dict(state)
    return model.to(next(llama.parameters()).dtype).eval()


NORMS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "opt": (
        "model.decoder.layers",
        {
            "self_attn_layer_norm": tuple(f"self_attn.{letter}_proj" for letter in "qkv"),
            "final_layer_norm": ("fc1",),
        },
    ),
    "bloom": (
        "transformer.h",
        {
            "input_layernorm": ("self_attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
    ),
    "gpt2": ("transformer.h", {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}),
    "llama": (
        "model.layers",
        {
            "input_layernorm": tuple(f"self_attn.{letter}_proj" for letter in "qkv"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
}
"""Model type -> its blocks, and each norm in a block with every linear that reads it."""


def norm_consumers(model: Any) -> dict[str, tuple[str, ...]]:
    """Return every norm in a model's blocks with its consumers, by their full names."""
    blocks, norms = NORMS[model.config.model_type]
    return {
        f"{blocks}.{index}.{norm}": tuple(f"{blocks}.{index}.{name}" for name in consumers)
        for index, _ in model.get_submodule(blocks).named_children()
        for norm, consumers in norms.items()
    }


@torch.no_grad()
def plant_outliers(
    model: nn.Module,
    consumers: Mapping[str, Sequence[str]],
    *,
    channels: int = 4,
    factor: float = 64.0,
) -> tuple[int, ...]:
    """Make the same few channels of every norm's output `factor` times as large; return them.

    The linears that read them (nn.Linear or Conv1D) have their weights there divided by as much:
    by a power of two, which changes no mantissa, so the model's function stays what it was. Naive
    int8 is ruined all the same, as in models of 6.7 B parameters and more (LLM.int8(), arXiv
    2208.07339).
    """
    first = model.get_parameter(f"{next(iter(consumers))}.weight")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(first), generator=generator)[:channels].sort().values
    for norm_name, linears in consumers.items():
        norm = model.get_submodule(norm_name)
        for parameter in norm.parameters(recurse=False):
            parameter[chosen] *= factor
        for name in linears:
            linear = model.get_submodule(name)
            weight = linear.get_parameter("weight")
            columns = weight.t() if isinstance(linear, Conv1D) else weight
            columns[:, chosen] /= factor
    return tuple(chosen.tolist())
