"""What a family of models is, as types: the rows are in `families`.

A group is one producer (a norm, or a linear whose output channels reach the consumers one to one)
and *every* consumer of its output; its consumers share one smoothing scale s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from sq_cpu.errors import SqCpuError

__all__ = ["Decoder", "Family", "Group", "Rows", "Stack"]


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
    """Config attributes (of a part of the config, with a dot) on whose values the fold depends."""

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
    norm_offset: float = 0.0
    """Norms multiply by weight + norm_offset: 1 for Gemma's x * (1 + w)."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Where the parts of a decoder are, so that its forward can run as one program.

    Paths are relative to the block, but for those that say otherwise. What attention does beside
    them (scale, window, soft-cap, sinks, rotary tables) is seen when the model runs.
    """

    base: str | None = None
    """The module that runs the blocks, from the base model, where it is not that itself."""
    blocks: str = "layers"
    """From the base, as the next five."""
    embedding: str = "embed_tokens"
    positions: str | None = None
    """Learned ones, added to the embedding; its `offset` is the row of position 0."""
    embedding_norm: str | None = None
    """The norm of what enters the first block."""
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    rotary_table: str | None = None
    """In a block: [positions, rotated], sines, then cosines, where no module gives them."""
    own_positions: bool = False
    """Whether positions that a call does not give count from each sequence's first token."""
    attention: str = "self_attn"
    own_attention: bool = False
    """Whether it is code of the model's own, not exchanged through transformers' interface."""
    head_dim: str = "head_dim"
    """The attention's value that says how many channels a head has."""
    scale: str | None = None
    """The value that q is multiplied by before attention; of own attention the scale of its scores,
    which else is 1 / sqrt(head_dim)."""
    alibi: str | None = None
    """The argument of attention with what is added to scores: a slope times the key's position."""
    attention_norm: str | tuple[str, ...] | None = "input_layernorm"
    """The first that a block has; so is mlp_norm."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three linears, or one whose output rows are q, then k, then v."""
    qkv_by_head: bool = False
    """Whether its rows are those of each kv head, one after another: its heads of q, k, v."""
    q_norm: str = "self_attn.q_norm"
    """Over each head or over whole rows, where a block has it; so is k_norm."""
    k_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    after_attention: str | None = None
    """The norm of what attention adds to the residual."""
    mlp_norm: str | tuple[str, ...] | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two linears, or one whose output rows are gate, then up; one is all, where `gated` is not."""
    gated: bool = True
    """Whether the MLP is down(act(gate(x)) * up(x)); else down(act(x W))."""
    parallel: bool | str = False
    """Whether attention and MLP read the same residual, or the config's value that says so."""
    down: str = "mlp.down_proj"
    activation: str = "hidden_act"
    """The config's value that names the activation function of gate, or the function's name."""
    after_mlp: str | None = None
    """The norm of what the MLP adds to the residual."""
    interleaved: bool = False
    """Whether rotary pairs are neighbours; else half a head apart."""
    when: Mapping[str, object] = field(default_factory=dict)
    """Values of the config that the row is for, as a group's: what no one call would show."""
    uses_rotary: str = "self_attn.use_rope"
    """What says whether a block has positions, where blocks differ."""
    residual_multiplier: str = "residual_multiplier"
    """The config's value for what attention and MLP add to the residual; without it 1."""
    softcap: str = "final_logit_softcapping"
    """The config's value for the cap of the logits; without it none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: where the blocks are, what is folded in each, and its program if it has one."""

    model_types: tuple[str, ...]
    """`config.model_type` of transformers' models, or the names of other models' classes."""
    stacks: tuple[Stack, ...]
    decoder: Decoder | None = None
