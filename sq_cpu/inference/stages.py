"""A decoder's forward as stages: data, and what they compute in plain torch.

A stage is what lies between two barriers of the threads; cpp/include/sq_cpu/program.h defines each.
`lowering` makes them of a model, and `program` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sq_cpu.kernels.embedding import gather_rows
from sq_cpu.kernels.paged_attention import AttentionOptions, attend_reference
from sq_cpu.nn.linear import QuantLinear

__all__ = [
    "Add",
    "Attend",
    "Embed",
    "Head",
    "Linear",
    "Merge",
    "Norm",
    "Normalize",
    "Positions",
    "Project",
    "Rotary",
    "Route",
    "Stage",
    "run_reference",
]


@dataclass(frozen=True, eq=False)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight, or a layer norm."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    """fp32 [width]; what a family adds to it is added."""
    bias: Tensor | None
    eps: float

    def reference(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., width]."""
        shape = self.weight.shape
        weight = self.weight.to(x.dtype)
        if self.kind == "rms":
            return nn.functional.rms_norm(x, shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.layer_norm(x, shape, weight, bias, self.eps)


@dataclass(frozen=True, eq=False)
class Embed:
    """out = table[id] * multiplier."""

    table: Tensor | QuantLinear
    """Floating point [vocabulary, width], or the head whose weight it is."""
    multiplier: float
    out: str

    @property
    def vocabulary(self) -> int:
        """The number of rows."""
        return self.table.out_features if isinstance(self.table, QuantLinear) else len(self.table)

    def rows(self, ids: Tensor) -> Tensor:
        """Return fp32 rows of the table, before the multiplier."""
        if not isinstance(self.table, QuantLinear):
            return self.table[ids].float()
        head = self.table
        return gather_rows(
            ids,
            head.packed,
            head.out_features,
            head.in_features,
            head.inverse_smoothing,
            torch.float32,
        )


@dataclass(frozen=True, eq=False)
class Positions:
    """out = out + table[position + offset]."""

    table: Tensor
    """fp32 [rows, width]."""
    offset: int
    out: str


@dataclass(frozen=True, eq=False)
class Linear:
    """Rows begin .. end of a layer, in a `Project`.

    y = cap(activation(x W^T + bias) * multiplier) * other, or y added to what out holds.
    """

    layer: QuantLinear | nn.Linear
    begin: int
    end: int
    out: str
    column: int = 0
    activation: str | None = None
    other: str | None = None
    accumulate: bool = False
    float_columns: Tensor | None = None
    """int64 [columns]: input channels that stay in float; the layer's weight is 0 there."""
    float_weight: Tensor | None = None
    """fp32 [columns, end - begin]; what they give is multiplied by nothing."""
    multiplier: float = 1.0
    softcap: float = 0.0
    """cap(y) = softcap * tanh(y / softcap); 0: y."""


@dataclass(frozen=True, eq=False)
class Project:
    """Linears of one input, normalized and quantized as each takes it."""

    source: str
    norm: Norm | None
    linears: tuple[Linear, ...]
    kept: bool = False
    """Of the rows alone whose result is wanted: a head."""
    list: int | None = None
    """Of as many rows as this list of the last `Route` has; it writes the first so many."""
    gather: bool = False
    """Whether it reads the rows of the list; else the first so many."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cos and sin of positions, as the model's own module gives them."""

    tables: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of int64 [1, positions]: cos and sin, [1, positions, rotated]."""
    interleaved: bool
    positions: int = 1 << 22
    """That there are."""

    def table(self, positions: int) -> Tensor:
        """Return fp32 [positions, 2, rotated]: cos, and sin with the sign of its product.

        Of fewer positions where there are no more.
        """
        positions = min(positions, self.positions)
        cos, sin = (x[0].float() for x in self.tables(torch.arange(positions)[None]))
        sign = torch.ones(cos.shape[1])
        if self.interleaved:
            cos, sin = (x[:, : x.shape[1] // 2].repeat_interleave(2, dim=1) for x in (cos, sin))
            sign[::2] = -1
        else:
            sign[: len(sign) // 2] = -1
        return torch.stack((cos, sin * sign), dim=1).contiguous()


@dataclass(frozen=True, eq=False)
class Attend:
    """Attention over what the cache of a layer holds, the new tokens' keys and values among it."""

    source: str
    """q, then k, then v, of whole heads; or `by_head` [q heads, k, v] of each kv head."""
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: Rotary | None
    options: AttentionOptions
    out: str
    by_head: bool = False


@dataclass(frozen=True, eq=False)
class Merge:
    """out = out + norm(source)."""

    source: str
    norm: Norm
    out: str


@dataclass(frozen=True, eq=False)
class Normalize:
    """buffer = norm(buffer), of its columns from `column` on."""

    buffer: str
    column: int
    norm: Norm


@dataclass(frozen=True, eq=False)
class Route:
    """The experts of each row, by the highest softmax of norm(source) W^T: a list of rows for each.

    Fills `zero` with zeros.
    """

    source: str
    norm: Norm | None
    weight: Tensor
    """Floating point [experts, width]."""
    top: int
    """Experts of a row."""
    renormalize: bool
    """Whether a row's weights sum to 1; else they are those of all experts' softmax."""
    zero: str


@dataclass(frozen=True, eq=False)
class Add:
    """out = out + source, or the rows of a list + their weights * source, or sigmoid(gate) * it."""

    source: str
    out: str
    list: int | None = None
    gate: str | None = None
    """A buffer of one column."""


@dataclass(frozen=True, eq=False)
class Head:
    """Logits: cap(layer(x) * multiplier), as `Linear` has it."""

    layer: QuantLinear | nn.Linear
    multiplier: float
    softcap: float


Stage = Embed | Positions | Project | Attend | Merge | Normalize | Route | Add


def run_reference(
    stages: Sequence[Stage], ids: Tensor, weights: Callable[[QuantLinear], Tensor]
) -> dict[str, Tensor]:
    """Compute what stages do to one sequence from its start, in plain torch and without int8.

    Parameters
    ----------
    ids : int64 [tokens]
    weights : gives an int8 layer's weight in float, [out_features, in_features], its smoothing
        undone

    Returns
    -------
    the buffers that the stages have written, fp32 [tokens, width]; attention is computed in fp64
    """
    buffers: dict[str, Tensor] = {}
    lists: list[tuple[Tensor, Tensor]] = []  # rows, and their weights
    for stage in stages:
        if isinstance(stage, Embed):
            buffers[stage.out] = stage.rows(ids) * stage.multiplier
        elif isinstance(stage, Positions):
            at = torch.arange(len(ids), device="cpu") + stage.offset
            buffers[stage.out] = buffers[stage.out] + stage.table[at]
        elif isinstance(stage, Normalize):
            x = buffers[stage.buffer]
            columns = slice(stage.column, stage.column + len(stage.norm.weight))
            x[:, columns] = stage.norm.reference(x[:, columns])
        elif isinstance(stage, Merge):
            buffers[stage.out] = buffers[stage.out] + stage.norm.reference(buffers[stage.source])
        elif isinstance(stage, Project):
            rows = None if stage.list is None else lists[stage.list][0]
            _project_reference(stage, buffers, weights, rows)
        elif isinstance(stage, Route):
            lists = _route_reference(stage, buffers)
        elif isinstance(stage, Add):
            _add_reference(stage, buffers, lists)
        else:
            buffers[stage.out] = _attend_reference(stage, buffers[stage.source])
    return buffers


def _route_reference(stage: Route, buffers: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    x = buffers[stage.source]
    buffers[stage.zero] = torch.zeros_like(x)
    x = x if stage.norm is None else stage.norm.reference(x)
    shares = nn.functional.linear(x, stage.weight.float()).softmax(dim=-1)
    chosen = shares.topk(stage.top, dim=-1)
    sums = chosen.values.sum(dim=-1, keepdim=True) if stage.renormalize else 1.0
    given = torch.zeros_like(shares).scatter(1, chosen.indices, chosen.values / sums)
    taken = torch.zeros_like(shares, dtype=torch.bool).scatter(1, chosen.indices, True)
    return [
        (taken[:, expert].nonzero()[:, 0], given[taken[:, expert], expert, None])
        for expert in range(len(stage.weight))
    ]


def _add_reference(
    stage: Add, buffers: dict[str, Tensor], lists: list[tuple[Tensor, Tensor]]
) -> None:
    x = buffers[stage.source]
    if stage.list is not None:
        rows, weight = lists[stage.list]
        if len(rows):
            buffers[stage.out] = buffers[stage.out].index_add(0, rows, x * weight)
        return
    factor = 1.0 if stage.gate is None else buffers[stage.gate].sigmoid()
    buffers[stage.out] = buffers[stage.out] + x * factor


def _project_reference(
    stage: Project,
    buffers: dict[str, Tensor],
    weights: Callable[[QuantLinear], Tensor],
    listed: Tensor | None,
) -> None:
    if listed is not None and not len(listed):
        return
    x = buffers[stage.source]
    x = x[listed] if stage.gather else x
    x = x if stage.norm is None else stage.norm.reference(x)
    written: dict[str, dict[int, Tensor]] = {}
    for linear in stage.linears:
        rows = slice(linear.begin, linear.end)
        bias, layer = linear.layer.bias, linear.layer
        weight = weights(layer) if isinstance(layer, QuantLinear) else layer.weight.detach()
        y = nn.functional.linear(
            x, weight[rows].float(), None if bias is None else bias[rows].detach().float()
        )
        y = _activate(linear.activation, y) * linear.multiplier
        if linear.softcap:
            y = linear.softcap * torch.tanh(y / linear.softcap)
        if linear.float_columns is not None and linear.float_weight is not None:
            y = y + x[:, linear.float_columns] @ linear.float_weight
        if linear.other is not None:
            y = y * written[linear.other][linear.column]
        if linear.accumulate:
            y = y + buffers[linear.out]
        written.setdefault(linear.out, {})[linear.column] = y
    for out, parts in written.items():
        buffers[out] = torch.cat([parts[column] for column in sorted(parts)], dim=1)


def _activate(activation: str | None, y: Tensor) -> Tensor:
    if activation is None:
        return y
    if activation == "gelu_tanh":
        return nn.functional.gelu(y, approximate="tanh")
    activated: Tensor = getattr(nn.functional, activation)(y)
    return activated


def _attend_reference(stage: Attend, x: Tensor) -> Tensor:
    heads = x.double().view(len(x), -1, stage.head_dim)
    if stage.by_head:
        group = stage.heads // stage.kv_heads
        parts = heads.view(len(x), stage.kv_heads, group + 2, stage.head_dim)
        q, k, v = parts[:, :, :group].flatten(1, 2), parts[:, :, group], parts[:, :, group + 1]
    else:
        q, k, v = torch.split(heads, [stage.heads, stage.kv_heads, stage.kv_heads], dim=1)
    q = q if stage.q_norm is None else stage.q_norm.reference(q)
    k = k if stage.k_norm is None else stage.k_norm.reference(k)
    if stage.rotary is not None:
        table = stage.rotary.table(len(x)).double()[:, :, None]
        q, k = (_rotate(z, table, stage.rotary.interleaved) for z in (q, k))
    return attend_reference(q, k, v, stage.options).flatten(1).float()


def _rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    rotated = table.shape[-1]
    turned, rest = torch.split(x, [rotated, x.shape[-1] - rotated], dim=-1)
    if interleaved:
        partner = turned.reshape(*turned.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        partner = turned.roll(rotated // 2, dims=-1)
    return torch.cat((turned * table[:, 0] + partner * table[:, 1], rest), dim=-1)
