"""Model families as data: which producer may be folded into which consumers.

A group is one producer (a norm, or a linear whose output channels reach the consumers one to one)
and *every* consumer of its output; its consumers share one smoothing scale s. A family is one row
of `FAMILIES`. Paths are relative to a decoder block; no row needs code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from sq_cpu.errors import SqCpuError

__all__ = [
    "FAMILIES",
    "Family",
    "Group",
    "SmoothingGroup",
    "check_ignore",
    "family_of",
    "is_ignored",
    "quantizable_linears",
    "smoothing_groups",
]


@dataclass(frozen=True)
class Group:
    """A producer and every consumer of its output, as paths within a decoder block."""

    producer: str
    consumers: tuple[str, ...]
    per_head: bool = False
    """The producer has one output per key-value head, each read by all query heads that share it
    (grouped-query attention): s must be constant over those heads."""


@dataclass(frozen=True)
class Family:
    """One row: where the decoder blocks are, what is folded in each, and what must hold."""

    model_types: tuple[str, ...]
    blocks: str
    """Path of the list of decoder blocks, from the base model (the one without a head)."""
    groups: tuple[Group, ...]
    require: Mapping[str, object] = field(default_factory=dict)
    """Config attributes on whose values the folds depend."""
    norm_offset: float = 0.0
    """Norms multiply by weight + norm_offset: 1 for Gemma's x * (1 + w)."""


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2"),
        blocks="layers",
        groups=(
            Group(
                "input_layernorm",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            # Attention mixes tokens, not channels, by weights that sum to 1: v's bias folds too.
            Group("self_attn.v_proj", ("self_attn.o_proj",), per_head=True),
            Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            # down's input is act(gate) * up: linear in up, whatever the activation function.
            Group("mlp.up_proj", ("mlp.down_proj",)),
        ),
    ),
    Family(
        model_types=("opt",),
        blocks="decoder.layers",
        groups=(
            Group(
                "self_attn_layer_norm",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            Group("self_attn.v_proj", ("self_attn.out_proj",), per_head=True),
            Group("final_layer_norm", ("fc1",)),
            # relu(x / s) = relu(x) / s for s > 0, and for no smoother activation function.
            Group("fc1", ("fc2",)),
        ),
        require={
            # Post-norm blocks (OPT-350m) add the norm's output to the residual.
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "layer_norm_elementwise_affine": True,
        },
    ),
)


@dataclass(frozen=True)
class SmoothingGroup:
    """A group of one model, by full module names, with its channel counts resolved.

    The consumers have `kv_heads * repeats * d` input channels and the producer `kv_heads * d`
    output channels; without grouped-query attention `repeats` is 1 and both are equal.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int
    """Output channels of the producer; s has this many entries."""
    kv_heads: int = 1
    repeats: int = 1
    """Query heads that read the same key-value head."""
    norm_offset: float = 0.0
    block: str = ""
    """Full name of the decoder block that holds producer and consumers."""

    @property
    def name(self) -> str:
        """The producer's full name, which is unique: a producer heads one group."""
        return self.producer

    def narrow(self, absmax: Tensor) -> Tensor:
        """Reduce [consumer channels] to [producer channels] by the max over repeated heads."""
        return absmax.reshape(self.kv_heads, self.repeats, -1).amax(dim=1).reshape(-1)

    def widen(self, s: Tensor) -> Tensor:
        """Repeat [producer channels] to [consumer channels], the inverse layout of `narrow`."""
        heads = s.reshape(self.kv_heads, 1, -1)
        return heads.expand(-1, self.repeats, -1).reshape(-1)


def family_of(model: nn.Module) -> Family:
    """Return the row of a Hugging Face model; `SqCpuError` when there is none or it cannot hold."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            break
    else:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise SqCpuError(
            f"cannot smooth a model of type {model_type or type(model).__name__!r}: "
            f"known are {known}; quantize it unsmoothed with smooth=False"
        )
    for attribute, required in family.require.items():
        actual = getattr(model.config, attribute, None)
        if actual != required:
            raise SqCpuError(
                f"cannot smooth this {model_type} model: its config has {attribute}={actual!r} and "
                f"the fold needs {required!r}; quantize it unsmoothed with smooth=False"
            )
    return family


def smoothing_groups(model: nn.Module) -> tuple[SmoothingGroup, ...]:
    """Return every smoothing group of a model of a known family, first block first.

    Raises `SqCpuError` on an unknown or unsupported model, a missing module, or shapes that do not
    fit together; nothing is ever skipped.
    """
    family = family_of(model)
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    path = f"{prefix}.{family.blocks}".removeprefix(".")
    return tuple(
        _resolve(model, family, group, f"{path}.{name}")
        for name, _ in _module(model, path).named_children()
        for group in family.groups
    )


def quantizable_linears(model: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Return the linears by full name; one that the model holds twice, by its first name.

    Left out are those whose full name is an entry of `ignore`, or ends with a dot and an entry.
    Only `nn.Linear` itself: a subclass may compute something else, or (the output projection of
    `nn.MultiheadAttention`) never be called.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not is_ignored(name, ignore)
    }


def check_ignore(model: nn.Module, ignore: tuple[str, ...]) -> None:
    """Raise `SqCpuError` for an entry that ignores no linear, which is most likely a typo.

    The default is let through: it stands for a head where there is one.
    """
    if ignore == ("lm_head",):
        return
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for entry in ignore:
        if not any(is_ignored(name, (entry,)) for name in names):
            # An entry can be any end of a name: offer those of as many parts.
            parts = entry.count(".") + 1
            ends = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names)
            close = " or ".join(get_close_matches(entry, ends)) or "the end of a linear's name"
            raise SqCpuError(f"ignore has {entry!r}, which matches no linear: use {close}")


def is_ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Say whether a full name is an entry of `ignore`, or ends with a dot and an entry."""
    return any(name == entry or name.endswith(f".{entry}") for entry in ignore)


def _resolve(model: nn.Module, family: Family, group: Group, block: str) -> SmoothingGroup:
    producer = f"{block}.{group.producer}"
    weight = getattr(_module(model, producer), "weight", None)
    if not isinstance(weight, Tensor):
        raise SqCpuError(f"cannot smooth: {producer} has no weight that could take the scale")
    channels = weight.shape[0]

    consumers = tuple(f"{block}.{consumer}" for consumer in group.consumers)
    kv_heads = _kv_heads(model.config) if group.per_head else 1
    repeats = 1
    for name in consumers:
        linear = _module(model, name)
        if type(linear) is not nn.Linear:
            raise SqCpuError(f"cannot smooth: {name} is a {type(linear).__name__}, not a Linear")
        if group.per_head:
            repeats = max(1, linear.in_features // channels)
        if linear.in_features != channels * repeats or channels % kv_heads:
            raise SqCpuError(
                f"cannot smooth: {name} has {linear.in_features} input channels, which does not "
                f"fit the {channels} output channels of {producer}"
            )
    return SmoothingGroup(
        producer=producer,
        consumers=consumers,
        channels=channels,
        kv_heads=kv_heads,
        repeats=repeats,
        norm_offset=family.norm_offset if weight.dim() == 1 else 0.0,
        block=block,
    )


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        model_type = getattr(model.config, "model_type", None)
        raise SqCpuError(
            f"cannot smooth: the model has no module {path!r}, which its type "
            f"({model_type}) should have; quantize it unsmoothed with smooth=False"
        ) from None
