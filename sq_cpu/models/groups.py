"""The smoothing groups of one model: every linear in exactly one, folded or divided at run time.

A group's consumers share s. It is folded where the model's family has a row for it; everything else
(an unknown model, a post-norm block, the output of a GELU) divides its input by s while that is
quantized, which is as exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sq_cpu.kernels.hadamard import rotated
from sq_cpu.models.families import family_of
from sq_cpu.models.family import Family, Group, Rows, Stack
from sq_cpu.models.linears import quantizable_linears

__all__ = [
    "HEAD_BLOCKS",
    "NO_BLOCKS",
    "Layout",
    "SmoothingGroup",
    "config_value",
    "is_down",
    "norm_weight",
    "smoothing_groups",
    "stack_paths",
]


HEAD_BLOCKS = (64, 32, 16)
"""Columns of a block of a head that a Hadamard matrix is worth its rounding for."""

NO_BLOCKS = "heads have no blocks of 16 channels"


@dataclass(frozen=True)
class Layout:
    """Where the entries of s are among a producer's outputs and the consumers' inputs.

    The consumers have `kv_heads * repeats * d` input channels and s has `kv_heads * d` entries;
    without grouped-query attention `repeats` is 1 and both are equal. The producer's outputs are,
    seen as `parts` equal parts, those from `start` to `stop` of each.
    """

    parts: int
    start: int
    stop: int
    kv_heads: int = 1
    repeats: int = 1
    """Query heads that read the same key-value head."""
    head: int = 0
    """Channels of a head, of attention's values; 0: the outputs are no values, or not known so."""

    @property
    def channels(self) -> int:
        """Entries of s."""
        return self.parts * (self.stop - self.start)

    def narrow(self, absmax: Tensor) -> Tensor:
        """Reduce [consumer channels] to [entries of s] by the max over repeated heads."""
        return absmax.reshape(self.kv_heads, self.repeats, -1).amax(dim=1).reshape(-1)

    def widen(self, s: Tensor) -> Tensor:
        """Repeat [entries of s] to [consumer channels], the inverse layout of `narrow`."""
        heads = s.reshape(self.kv_heads, 1, -1)
        return heads.expand(-1, self.repeats, -1).reshape(-1)

    def spread(self, s: Tensor, outputs: int) -> Tensor:
        """Return what each of the producer's outputs is divided by: s, and 1 where none reads."""
        full = s.new_ones(self.parts, outputs // self.parts)
        full[:, self.start : self.stop] = s.reshape(self.parts, -1)
        return full.reshape(-1)

    def rotate(self, x: Tensor, block: int) -> Tensor:
        """Return a producer's outputs, [..., outputs], with blocks of values rotated.

        `block` divides `head`. The consumers' input is then rotated likewise, block by block.
        """
        full = x.reshape(*x.shape[:-1], self.parts, -1).clone()
        full[..., self.start : self.stop] = rotated(full[..., self.start : self.stop], block)
        return full.reshape(x.shape)


@dataclass(frozen=True)
class SmoothingGroup:
    """A group of one model, by full module names."""

    name: str
    """The producer's full name, or the first consumer's and ".input" where there is none."""
    consumers: tuple[str, ...]
    layout: Layout
    producer: str | None = None
    """None: s divides the consumers' input while that is quantized."""
    reason: str = ""
    """Why there is no producer."""
    norm_offset: float = 0.0
    block: str = ""
    """Full name of the block that holds producer and consumers; "" outside of all blocks."""
    down: bool | None = None
    """Whether an MLP's up (and gate) make the input; None: the family does not say."""

    @property
    def head_block(self) -> int:
        """Columns of the largest block that divides a head of the producer's values; 0: none."""
        head = self.layout.head if self.producer is not None else 0
        return next((block for block in HEAD_BLOCKS if head and head % block == 0), 0)

    def unfolded(self, reason: str) -> SmoothingGroup:
        """Return this group without its producer: s divides the input at run time."""
        return replace(self, producer=None, reason=reason, norm_offset=0.0)


def smoothing_groups(model: nn.Module) -> tuple[SmoothingGroup, ...]:
    """Return the groups of a linearized model: each quantizable linear consumes in just one.

    Nothing is skipped: what a family's row cannot hold for (a missing module, an unmet condition,
    shapes that do not fit) has no producer and says why.
    """
    linears = quantizable_linears(model)
    family = family_of(model)
    blocks = _blocks(model, family) if family else {}
    rows = [
        _resolve(model, stack, paired, name, linears)
        for name, (block, stack) in blocks.items()
        for group in stack.groups
        for paired in _paired(group, block)
    ]
    found: dict[str, SmoothingGroup] = {}
    # Folds first: conditions may choose between two rows for the same linears.
    for group in sorted(filter(None, rows), key=lambda group: group.producer is None):
        if not any(name in found for name in group.consumers):
            found |= dict.fromkeys(group.consumers, group)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    reason = "no exact fold is known for it" if family else f"no family row for {kind!r}"
    for name, linear in linears.items():
        if name not in found:
            block = next((block for block in blocks if name.startswith(f"{block}.")), "")
            alone = _without_producer((name,), linear.in_features, reason, block)
            found[name] = replace(alone, down=False if family and not block else None)
    return tuple(dict.fromkeys(found[name] for name in linears))


def norm_weight(model: nn.Module, group: SmoothingGroup) -> Tensor | None:
    """Return gamma of the norm that makes a group's input, fp32; None where no norm does."""
    if group.producer is None:
        return None
    weight = model.get_parameter(f"{group.producer}.weight").detach().float()
    return weight + group.norm_offset if weight.dim() == 1 else None


def is_down(model: nn.Module, group: SmoothingGroup) -> bool:
    """Say whether a group is the down projection of an MLP, whose input has the largest outliers.

    The family's row for it says so: its producer is a linear, and not that of attention's values.
    Without a row (the output of a GELU, an unknown model) it is one where no norm makes the input
    and all linears have fewer outputs; of a known model none outside of its blocks is.
    """
    if group.down is not None:
        return group.down
    if norm_weight(model, group) is not None:
        return False
    shapes = (model.get_parameter(f"{name}.weight").shape for name in group.consumers)
    return all(columns > rows for rows, columns in shapes)


def _without_producer(
    consumers: tuple[str, ...], channels: int, reason: str, block: str
) -> SmoothingGroup:
    layout = Layout(1, 0, channels)
    return SmoothingGroup(f"{consumers[0]}.input", consumers, layout, reason=reason, block=block)


def stack_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the full name of each of the family's lists of blocks."""
    base = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return [f"{prefix}.{stack.blocks}".removeprefix(".") for stack in family.stacks]


def _blocks(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, Stack]]:
    """Return every block by full name, with the stack that it is of."""
    blocks = {}
    for stack, path in zip(family.stacks, stack_paths(model, family), strict=True):
        modules = _module(model, path)
        for key, block in modules.named_children() if modules else ():
            blocks[f"{path}.{key}"] = (block, stack)
    return blocks


def _paired(group: Group, block: nn.Module) -> Iterator[Group]:
    """Yield the group once for each child that its `*` stands for; as it is, without a `*`."""
    before, star, _ = group.consumers[0].partition(".*")
    if not star:
        yield group
        return
    modules = _module(block, before)
    for key, _ in modules.named_children() if modules else ():
        consumers = tuple(path.replace("*", key) for path in group.consumers)
        producer = group.producer and group.producer.replace("*", key)
        yield replace(group, producer=producer, consumers=consumers)


def _resolve(
    model: nn.Module,
    stack: Stack,
    group: Group,
    block: str,
    linears: Mapping[str, nn.Linear],
) -> SmoothingGroup | None:
    """Return the group by full names; None where the block has nothing of it."""
    names = tuple(f"{block}.{path}" for path in group.consumers)
    consumers = tuple(name for name in names if name in linears)
    if not consumers:
        return None
    channels = linears[consumers[0]].in_features
    if any(linears[name].in_features != channels for name in consumers):
        return None

    down = _makes_down(group, block, model)

    def refused(reason: str) -> SmoothingGroup:
        return replace(_without_producer(consumers, channels, reason, block), down=down)

    if group.producer is None:
        return refused("no exact fold is known for it")
    for attribute, required in group.when.items():
        actual = config_value(model, attribute)
        if actual != required:
            return refused(f"{attribute} is {actual!r}, and the fold needs {required!r}")
    for name in names:
        if name not in linears:
            return refused(f"the model has no linear {name}")
    producer = f"{block}.{group.producer}"
    weight = getattr(_module(model, producer), "weight", None)
    if not isinstance(weight, nn.Parameter):  # nor one that is computed from others
        return refused(f"{producer} has no weight that could take the scale")
    layout = _layout(model, group.rows, weight.shape[0], channels)
    if layout is None:
        return refused(f"{producer} has {weight.shape[0]} outputs, which do not fit {channels}")
    return SmoothingGroup(
        producer,
        consumers,
        layout,
        producer=producer,
        norm_offset=stack.norm_offset if weight.dim() == 1 else 0.0,
        block=block,
        down=down,
    )


def _makes_down(group: Group, block: str, model: nn.Module) -> bool | None:
    """Return whether a row is of an MLP's down; None where the model lacks its producer."""
    if group.producer is None or group.rows not in ("all", "second_half"):
        return False  # attention's output mixes the rows of v
    producer = _module(model, f"{block}.{group.producer}")
    return None if producer is None else isinstance(producer, nn.Linear)


def _layout(model: nn.Module, rows: Rows, outputs: int, inputs: int) -> Layout | None:
    """Return where among the producer's outputs the consumers' inputs are; None: nowhere."""
    heads = _head_count(model)
    layout = _layout_of_heads(heads or 1, rows, outputs, inputs)
    if layout is None or rows in ("all", "second_half") or not heads or inputs % heads:
        return layout
    return replace(layout, head=inputs // heads)


def _layout_of_heads(heads: int, rows: Rows, outputs: int, inputs: int) -> Layout | None:
    if rows in ("all", "value") and outputs == inputs:
        return Layout(1, 0, outputs)
    if rows == "second_half" and outputs == 2 * inputs:
        return Layout(1, inputs, outputs)
    if inputs % heads:
        return None
    if rows == "last_of_head" and outputs % heads == 0 and outputs >= inputs:
        return Layout(heads, (outputs - inputs) // heads, outputs // heads)
    if rows in ("value", "qkv", "qkv_by_head"):
        values = outputs if rows == "value" else (outputs - inputs) // 2
        kv_heads = values // (inputs // heads)
        total = values if rows == "value" else inputs + 2 * values
        if kv_heads < 1 or heads % kv_heads or values % kv_heads or total != outputs:
            return None
        parts = kv_heads if rows == "qkv_by_head" else 1
        start, stop = (outputs - values) // parts, outputs // parts
        return Layout(parts, start, stop, kv_heads, heads // kv_heads)
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def config_value(model: nn.Module, path: str) -> Any:
    """Return what the config of a model's text part has at a path; None: nothing."""
    value = _text_config(model)
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _head_count(model: nn.Module) -> int:
    return int(getattr(_text_config(model), "num_attention_heads", None) or 0)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
