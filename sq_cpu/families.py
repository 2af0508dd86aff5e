"""Model families as data: which producer may be folded into which consumers.

A group is one producer (a norm, or a linear whose output channels reach the consumers one to one)
and *every* consumer of its output; its consumers share one smoothing scale s. A family is one row
of `FAMILIES`; no row needs code of its own. A row claims, `folding` proves on the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from sq_cpu.errors import SqCpuError

__all__ = ["FAMILIES", "Family", "Group", "Rows", "Stack", "family_of", "register_family"]

Rows = Literal["all", "second_half", "value", "qkv", "qkv_by_head", "last_of_head"]
"""Which output rows of a producer reach the consumers:

all             every row
second_half     of [gate; up], the rows of up
value           every row, each key-value head read by several query heads (grouped-query attention)
qkv             of [q; k; v], the rows of v, which may have fewer heads than q
qkv_by_head     the same for each key-value head: [q, ..., q, k, v], [q, ..., q, k, v], ...
last_of_head    of each head, as many last rows as a head has channels: [k; v], or [q; k; v]
"""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A producer and every consumer of its output, as paths within a block.

    A `*` stands for each of a module list's children, the same one in all the paths. A block that
    has none of the modules (a dense one among mixtures of experts) is passed over.
    """

    producer: str | None
    """None: nothing can be folded, but these share their input, and so one s."""
    consumers: tuple[str, ...]
    rows: Rows = "all"
    when: Mapping[str, object] = field(default_factory=dict)
    """Config attributes on whose values the fold depends."""

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows) or not self.consumers:
            raise SqCpuError(
                f"group {self.producer}: needs consumers, and rows of {get_args(Rows)}"
            )


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of like blocks and the groups of each."""

    blocks: str
    """Path of the module list, from the base model (the one without a head)."""
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: where the blocks are, and what is folded in each."""

    model_types: tuple[str, ...]
    """`config.model_type` of transformers' models, or the names of other models' classes."""
    stacks: tuple[Stack, ...]
    norm_offset: float = 0.0
    """Norms multiply by weight + norm_offset: 1 for Gemma's x * (1 + w)."""


def _gated(attention: str | None, mlp: str | None) -> tuple[Group, ...]:
    """Return the groups of q, k, v, o and of gate, up, down, between two norms."""
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Group(producer=attention, consumers=qkv),
        # Attention mixes tokens, not channels, by weights that sum to 1: v's bias folds too.
        Group(producer="self_attn.v_proj", consumers=("self_attn.o_proj",), rows="value"),
        Group(producer=mlp, consumers=("mlp.gate_proj", "mlp.up_proj")),
        # down's input is act(gate) * up: linear in up, whatever the activation function.
        Group(producer="mlp.up_proj", consumers=("mlp.down_proj",)),
    )


FAMILIES: list[Family] = [
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
        stacks=(
            Stack(blocks="layers", groups=_gated("input_layernorm", "post_attention_layernorm")),
        ),
    ),
    Family(
        model_types=("opt",),
        stacks=(
            Stack(
                blocks="decoder.layers",
                groups=(
                    Group(
                        producer="self_attn_layer_norm",
                        consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                        # Post-norm blocks (OPT-350m) add the norm's output to the residual.
                        when={"do_layer_norm_before": True},
                    ),
                    Group(
                        producer="self_attn.v_proj",
                        consumers=("self_attn.out_proj",),
                        rows="value",
                    ),
                    Group(
                        producer="final_layer_norm",
                        consumers=("fc1",),
                        when={"do_layer_norm_before": True},
                    ),
                    # relu(x / s) = relu(x) / s for s > 0, and for no smoother activation function.
                    Group(producer="fc1", consumers=("fc2",), when={"activation_function": "relu"}),
                ),
            ),
        ),
    ),
]


def register_family(family: Family) -> None:
    """Add a row, which comes before those of the same model types."""
    if not isinstance(family, Family):
        raise SqCpuError(f"register_family takes a Family, not a {type(family).__name__}")
    FAMILIES.insert(0, family)


def family_of(model: nn.Module) -> Family | None:
    """Return the row of a model, by its config's model type or its class's name; None: no row."""
    config: Any = getattr(model, "config", None)
    names = (getattr(config, "model_type", None), type(model).__name__)
    for family in FAMILIES:
        if any(name in family.model_types for name in names):
            return family
    return None
