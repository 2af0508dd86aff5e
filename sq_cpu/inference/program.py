"""A decoder's forward as stages, and the one native call that runs them.

A stage is what lies between two barriers of the threads; cpp/include/sq_cpu/program.h defines each.
Here they are data: `lowering` makes them of a model, `DecoderProgram` hands them to the library,
and `run_reference` says in plain torch what they compute, without int8.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.embedding import gather_rows
from sq_cpu.kernels.paged_attention import AttentionOptions, BatchRows, KvPages, attend_reference
from sq_cpu.nn.linear import QuantLinear

__all__ = [
    "Attend",
    "DecoderProgram",
    "Embed",
    "Linear",
    "Merge",
    "Norm",
    "Project",
    "Rotary",
    "Stage",
    "StepRows",
    "run_reference",
]

_STRIP = 16  # rows of a weight that are packed together
_ROTARY_ROWS = 512  # positions that a rotary table grows by
_MOST_POSITIONS = 1 << 22


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
            ids, head.packed, head.out_features, head.in_features, head.smoothing, torch.float32
        )


@dataclass(frozen=True, eq=False)
class Linear:
    """Rows begin .. end of an int8 layer, in a `Project`.

    y = activation(x W^T + bias) * other, or y added to what out holds.
    """

    layer: QuantLinear
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
    """fp32 [columns, end - begin]."""


@dataclass(frozen=True, eq=False)
class Project:
    """Linears of one input, normalized and quantized once."""

    source: str
    norm: Norm | None
    linears: tuple[Linear, ...]
    kept: bool = False
    """Of the rows alone whose result is wanted: a head."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cos and sin of positions, as the model's own module gives them."""

    tables: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of int64 [1, positions]: cos and sin, [1, positions, rotated]."""
    interleaved: bool

    def table(self, positions: int) -> Tensor:
        """Return fp32 [positions, 2, rotated]: cos, and sin with the sign of its product."""
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
    """q, then k, then v, of whole heads."""
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: Rotary | None
    options: AttentionOptions
    out: str


@dataclass(frozen=True, eq=False)
class Merge:
    """out = out + norm(source)."""

    source: str
    norm: Norm
    out: str


Stage = Embed | Project | Attend | Merge


@dataclass(eq=False)
class StepRows:
    """The new tokens of a step, one sequence after another."""

    ids: Tensor
    """int64 [rows]."""
    positions: Tensor
    """int64 [rows], of the rotary tables."""
    first_row: Tensor
    """int64 [sequences + 1]."""
    length: Tensor
    """int64 [sequences]: tokens of each, the new ones among them."""
    table: Tensor
    """int32 [tables, sequences, pages]: token j of a sequence lies in its page j // 64."""
    kept: Tensor
    """int64 [kept], ascending: the rows whose result is wanted."""


class DecoderProgram:
    """Stages, ready to run; it keeps the tensors that they name.

    Parameters
    ----------
    stages : in the order in which they run
    widths : of each buffer that they name, fp32 [rows, width]
    result : the buffer whose rows `run` returns
    final_norm : what makes them the model's last hidden state

    Raises
    ------
    SqCpuError
        For stages that do not fit together, and a quantizer whose scale is of the whole batch.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        widths: dict[str, int],
        result: str,
        final_norm: Norm | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.final_norm = final_norm
        self._widths = dict(widths)
        self._result = result
        self.width = widths[result]
        self._program = _core.Program()
        self._buffers = {name: self._program.buffer(width) for name, width in widths.items()}
        attends = [stage for stage in self.stages if isinstance(stage, Attend)]
        self.cache_shapes = [(stage.kv_heads, stage.head_dim) for stage in attends]
        """(kv heads, head size) of each layer that has a cache."""
        self._rotaries = [*dict.fromkeys(s.rotary for s in attends if s.rotary is not None)]
        self._positions = 0  # that the rotary tables have
        self._lock = threading.Lock()
        self._caches: list[tuple[Tensor, int, int]] = []
        layer = 0
        for stage in self.stages:
            self._add(stage, layer)
            layer += isinstance(stage, Attend)
        self._program.result(self._buffers[result])

    def followed_by(self, head: QuantLinear) -> DecoderProgram:
        """Return the program whose result is the logits that `head` gives, [kept, vocabulary]."""
        linear = Linear(head, 0, head.out_features, "logits")
        stage = Project(self._result, self.final_norm, (linear,), kept=True)
        widths = self._widths | {"logits": head.out_features}
        return DecoderProgram([*self.stages, stage], widths, "logits")

    def _add(self, stage: Stage, layer: int) -> None:
        at = self._buffers
        if isinstance(stage, Embed):
            self._embed(stage)
        elif isinstance(stage, Merge):
            after = _norm(stage.norm)
            assert after is not None
            self._program.merge(at[stage.source], after, at[stage.out])
        elif isinstance(stage, Attend):
            kv_width = stage.kv_heads * stage.head_dim
            first_key = stage.heads * stage.head_dim
            options = stage.options
            self._program.attend(
                at[stage.source],
                0,
                first_key,
                first_key + kv_width,
                stage.heads,
                stage.kv_heads,
                stage.head_dim,
                _norm(stage.q_norm),
                _norm(stage.k_norm),
                -1 if stage.rotary is None else self._rotaries.index(stage.rotary),
                layer,
                options.scale,
                options.window,
                options.softcap,
                options.slopes,
                options.sinks,
                at[stage.out],
            )
        else:
            quantizer = stage.linears[0].layer._quantizer
            if any(linear.layer._quantizer != quantizer for linear in stage.linears):
                raise SqCpuError("linears of one input quantize it differently")
            linears = [self._linear(linear) for linear in stage.linears]
            self._program.project(
                at[stage.source], 0, _norm(stage.norm), quantizer, stage.kept, linears
            )

    def _embed(self, stage: Embed) -> None:
        out, head = self._buffers[stage.out], stage.table
        if isinstance(head, Tensor):
            return self._program.embed(head, stage.multiplier, out)
        self._program.embed_packed(
            head.packed,
            head.out_features,
            head.in_features,
            head._quantizer,
            stage.multiplier,
            out,
        )
        return None

    def _linear(self, linear: Linear) -> tuple[object, ...]:
        layer = linear.layer
        if linear.begin % _STRIP:
            raise SqCpuError(f"a part of a linear begins with row {linear.begin}, within a strip")
        strip = _core.packed_bytes(_STRIP, layer.in_features)
        strips = slice(linear.begin // _STRIP * strip, -(-linear.end // _STRIP) * strip)
        return (
            layer.packed[strips],
            linear.end - linear.begin,
            layer.in_features,
            self._buffers[linear.out],
            linear.column,
            getattr(_core.Activation, linear.activation or "none"),
            -1 if linear.other is None else self._buffers[linear.other],
            linear.accumulate,
            linear.float_columns,
            linear.float_weight,
        )

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Sequence[BatchRows],
        caches: Sequence[tuple[KvPages, int]],
        kept: Tensor,
        threads: int = 0,
    ) -> Tensor:
        """Run all stages over new tokens, whose keys and values go into the caches.

        Parameters
        ----------
        ids, positions : int64 [rows], one sequence after another
        rows : which rows belong to which sequence; one for each page table
        caches : the pages of each layer, and the number of its page table
        kept : int64 [kept], ascending: the rows whose result is wanted
        threads : of torch's, at most; 0: all

        Returns
        -------
        fp32 [kept, width of the result]; the same bits for any batch, threads and cut into calls

        Raises
        ------
        SqCpuError
            For ids and positions that there are not, and for caches of other shapes.
        """
        first_row, length, _ = rows[0].tensors
        tables = torch.stack([each.tensors[2] for each in rows])
        step = StepRows(ids, positions, first_row, length, tables, kept)
        return self.run_step(step, caches, threads)

    def run_step(
        self, step: StepRows, caches: Sequence[tuple[KvPages, int]], threads: int = 0
    ) -> Tensor:
        """As `run`, with the rows as the library takes them."""
        given = [(pages.tensor, pages.head_dim, table) for pages, table in caches]
        result = torch.empty((len(step.kept), self.width), dtype=torch.float32, device="cpu")
        with self._lock:  # from two threads, one waits
            if len(given) != len(self._caches) or any(
                a[0] is not b[0] or a[2] != b[2] for a, b in zip(given, self._caches, strict=True)
            ):
                self._program.set_caches(given)
                self._caches = given
            self._grow(int(step.positions.max()) + 1 if len(step.positions) else 0)
            self._program.run(
                step.ids,
                step.positions,
                step.first_row,
                step.length,
                step.table,
                step.kept,
                result,
                threads,
            )
        return result

    def _grow(self, positions: int) -> None:
        if positions <= self._positions or not self._rotaries:
            return
        if positions > _MOST_POSITIONS:
            raise SqCpuError(f"position {positions - 1}: positions go up to {_MOST_POSITIONS - 1}")
        wanted = -(-max(positions, 2 * self._positions) // _ROTARY_ROWS) * _ROTARY_ROWS
        self._program.set_rotaries(
            [(rotary.table(wanted), rotary.interleaved) for rotary in self._rotaries]
        )
        self._positions = wanted


def _norm(
    norm: Norm | None,
) -> tuple[_core.NormKind, Tensor | None, Tensor | None, float] | None:
    if norm is None:
        return None
    return getattr(_core.NormKind, norm.kind), norm.weight, norm.bias, norm.eps


def run_reference(
    stages: Sequence[Stage], ids: Tensor, weights: Callable[[QuantLinear], Tensor]
) -> dict[str, Tensor]:
    """Compute what stages do to one sequence from its start, in plain torch and without int8.

    Parameters
    ----------
    ids : int64 [tokens]
    weights : gives a layer's weight in float, [out_features, in_features], its smoothing undone

    Returns
    -------
    the buffers that the stages have written, fp32 [tokens, width]; attention is computed in fp64
    """
    buffers: dict[str, Tensor] = {}
    for stage in stages:
        if isinstance(stage, Embed):
            buffers[stage.out] = stage.rows(ids) * stage.multiplier
        elif isinstance(stage, Merge):
            buffers[stage.out] = buffers[stage.out] + stage.norm.reference(buffers[stage.source])
        elif isinstance(stage, Project):
            _project_reference(stage, buffers, weights)
        else:
            buffers[stage.out] = _attend_reference(stage, buffers[stage.source])
    return buffers


def _project_reference(
    stage: Project, buffers: dict[str, Tensor], weights: Callable[[QuantLinear], Tensor]
) -> None:
    x = buffers[stage.source]
    x = x if stage.norm is None else stage.norm.reference(x)
    written: dict[str, dict[int, Tensor]] = {}
    for linear in stage.linears:
        rows = slice(linear.begin, linear.end)
        bias = linear.layer.bias
        y = nn.functional.linear(
            x, weights(linear.layer)[rows], None if bias is None else bias[rows]
        )
        if linear.float_columns is not None and linear.float_weight is not None:
            y = y + x[:, linear.float_columns] @ linear.float_weight
        y = _activate(linear.activation, y)
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
    return getattr(nn.functional, activation)(y)  # type: ignore[no-any-return]


def _attend_reference(stage: Attend, x: Tensor) -> Tensor:
    heads = x.double().view(len(x), -1, stage.head_dim)
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
