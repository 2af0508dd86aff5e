"""What a call of a decoder shows: what its attention is told, what enters its blocks, its logits.

None of it is claimed by the row of a family, which says only where the parts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.attention import attention_in_floats
from sq_cpu.inference.stages import Embed
from sq_cpu.models.family import Decoder
from sq_cpu.models.hf_private import attending_by
from sq_cpu.models.hooks import hooked
from sq_cpu.models.linears import head_of
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.linear import QuantLinear

__all__ = ["Seen", "attending", "find", "is_altered", "see", "table_of"]

_TOKENS = 24  # of the call in which a model is seen


@dataclass
class Seen:
    """What a call of the model showed."""

    ids: Tensor
    """int64 [1, tokens]."""
    options: dict[nn.Module, Mapping[str, Any]] = field(default_factory=dict)
    """Of each attention: the keyword arguments of its attention function."""
    rotaries: dict[nn.Module, tuple[Any, ...]] = field(default_factory=dict)
    """Of each attention: what its rotary embedding was called with, beside x and positions."""
    biases: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Of each attention: what is added to its scores, by head and position of the key."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Of each block: its arguments, hidden states first."""
    residual: Tensor | None = None
    """What the last block returned."""
    hidden: Tensor | None = None
    """What the base model returned."""
    head: tuple[Tensor, Tensor] | None = None
    """What the head was given and what it returned."""
    logits: Tensor | None = None


def see(model: Any, base: nn.Module, decoder: Decoder) -> Seen:
    """Call a model once, in which its own code computes everything, and return what is seen."""
    embed = Embed(table_of(find(base, decoder.embedding)), 1.0, "residual")
    seen = Seen((torch.arange(_TOKENS, device="cpu") * 7919 % embed.vocabulary)[None])
    tables: list[tuple[Any, tuple[Any, ...]]] = []  # what rotary gave, and for what

    def rotary_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        extra = (value for name, value in kwargs.items() if name not in ("x", "position_ids"))
        tables.append((output, (*args[2:], *extra)))

    def attention_called(module: nn.Module, _: Any, kwargs: Any) -> None:
        given = kwargs.get("position_embeddings")
        for output, key in tables:
            if given is not None and given[0] is output[0]:
                seen.rotaries[module] = key
        bias = None if decoder.alibi is None else kwargs.get(decoder.alibi)
        if bias is not None:
            seen.biases[module] = bias

    def block_called(_: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.calls.append(((x.clone(), *args[1:]), rest))

    def last_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.residual = (output[0] if isinstance(output, tuple) else output).clone()

    def base_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.hidden = output[0]

    def head_called(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.head = args[0], output.clone()

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.options[module] = kwargs
        return attention_in_floats(module, *args, **kwargs)

    rotary = find(base, decoder.rotary, optional=True)
    blocks = find(base, decoder.blocks)
    head = head_of(model)
    after = [] if rotary is None else [(rotary, rotary_called)]
    after += [(blocks[-1], last_called), (base, base_called)]
    after += [] if head is None else [(head, head_called)]
    before: list[tuple[nn.Module, Any]] = [(block, block_called) for block in blocks]
    before += [(find(block, decoder.attention), attention_called) for block in blocks]
    with hooked(before=before, after=after), attending(model, decoder, attend):
        output = (base if head is None else model)(input_ids=seen.ids, use_cache=False)
    seen.logits = None if head is None else getattr(output, "logits", None)
    return seen


@contextmanager
def attending(model: Any, decoder: Decoder, attend: Any) -> Iterator[None]:
    """Have a model attend by a function, unless its attention is its own."""
    if decoder.own_attention:
        yield
    else:
        with attending_by(model, attend):
            yield


def find(module: Any, path: str, *, optional: bool = False) -> Any:
    """Return what is at a path; where there is nothing, None or an `SqCpuError`."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            if optional:
                return None
            raise SqCpuError(f"the model has no {path}")
    return module


def table_of(embedding: nn.Module) -> Tensor | QuantLinear:
    """Return what holds the rows of an embedding."""
    if isinstance(embedding, QuantEmbedding):
        return embedding.head
    weight: Tensor = embedding.weight.detach()  # type: ignore[operator]
    return weight


def is_altered(layer: nn.Module) -> bool:
    """Say whether a layer does something beside what its class does."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__
