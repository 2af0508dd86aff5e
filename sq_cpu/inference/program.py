"""The one native call that runs a decoder's stages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.stages import (
    Add,
    Attend,
    Embed,
    Head,
    Linear,
    Merge,
    Norm,
    Normalize,
    Positions,
    Project,
    Route,
    Stage,
)
from sq_cpu.inference.team_size import TeamSize
from sq_cpu.kernels import _core
from sq_cpu.kernels.paged_attention import BatchRows, KvPages
from sq_cpu.nn.linear import QuantLinear

__all__ = ["DecoderProgram", "StepRows"]

_STRIP = 16  # rows of a weight that are packed together
_ROTARY_ROWS = 512  # positions that a rotary table grows by
_MOST_POSITIONS = 1 << 22


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
    head : what makes logits of that; None: something else, or nothing
    output : the class of what the model returns
    own_positions : whether a sequence's positions count from its first token where none are given

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
        head: Head | None = None,
        *,
        output: Callable[..., Any] = dict,
        own_positions: bool = False,
    ) -> None:
        self.stages = tuple(stages)
        self.final_norm = final_norm
        self.head = head
        self.output = output
        self.own_positions = own_positions
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
        self._team = TeamSize()
        self._caches: list[tuple[Tensor, int, _core.KvType, int]] = []
        layer = 0
        for stage in self.stages:
            self._add(stage, layer)
            layer += isinstance(stage, Attend)
        self._program.result(self._buffers[result])

    def followed_by(self, head: Head) -> DecoderProgram:
        """Return the program whose result is the logits that `head` gives, [kept, vocabulary]."""
        layer, rows = head.layer, head.layer.out_features
        linear = Linear(layer, 0, rows, "logits", multiplier=head.multiplier, softcap=head.softcap)
        stage = Project(self._result, self.final_norm, (linear,), kept=True)
        widths = self._widths | {"logits": rows}
        return DecoderProgram([*self.stages, stage], widths, "logits")

    def _add(self, stage: Stage, layer: int) -> None:
        at = self._buffers
        if isinstance(stage, Embed):
            self._embed(stage)
        elif isinstance(stage, Positions):
            self._program.position(stage.table, stage.offset, at[stage.out])
        elif isinstance(stage, Merge):
            self._program.merge(at[stage.source], _norm(stage.norm), at[stage.out])
        elif isinstance(stage, Route):
            norm = None if stage.norm is None else _norm(stage.norm)
            weight = stage.weight.contiguous()
            self._program.route(
                at[stage.source], norm, weight, stage.top, stage.renormalize, at[stage.zero]
            )
        elif isinstance(stage, Add):
            gate = -1 if stage.gate is None else at[stage.gate]
            rows = -1 if stage.list is None else stage.list
            self._program.add(at[stage.source], rows, gate, at[stage.out])
        elif isinstance(stage, Normalize):
            columns = len(stage.norm.weight)
            self._program.norm(at[stage.buffer], stage.column, columns, _norm(stage.norm))
        elif isinstance(stage, Attend):
            self._attend(stage, layer)
        else:
            self._project(stage)

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

    def _attend(self, stage: Attend, layer: int) -> None:
        options = stage.options
        # Of each kv head, or of all: its q heads, its keys, its values.
        kv_heads = 1 if stage.by_head else stage.kv_heads
        group = stage.heads * kv_heads // stage.kv_heads
        self._program.attend(
            self._buffers[stage.source],
            0,
            group * stage.head_dim,
            (group + kv_heads) * stage.head_dim,
            stage.heads,
            stage.kv_heads,
            stage.head_dim,
            None if stage.q_norm is None else _norm(stage.q_norm),
            None if stage.k_norm is None else _norm(stage.k_norm),
            -1 if stage.rotary is None else self._rotaries.index(stage.rotary),
            layer,
            options.scale,
            options.window,
            options.softcap,
            options.slopes,
            options.sinks,
            self._buffers[stage.out],
            (group + 2) * stage.head_dim if stage.by_head else 0,
        )

    def _project(self, stage: Project) -> None:
        for quantizer, linears in _by_quantizer(stage.linears):
            self._program.project(
                self._buffers[stage.source],
                0,
                None if stage.norm is None else _norm(stage.norm),
                quantizer,
                stage.kept,
                [self._linear(linear) for linear in linears],
                -1 if stage.list is None else stage.list,
                stage.gather,
            )

    def _linear(self, linear: Linear) -> tuple[object, ...]:
        layer = linear.layer
        return (
            *(_packed(layer, linear) if isinstance(layer, QuantLinear) else _floats(layer, linear)),
            linear.end - linear.begin,
            layer.in_features,
            self._buffers[linear.out],
            linear.column,
            getattr(_core.Activation, linear.activation or "none"),
            -1 if linear.other is None else self._buffers[linear.other],
            linear.accumulate,
            linear.float_columns,
            linear.float_weight,
            linear.multiplier,
            linear.softcap,
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
        threads : of torch's, at most; 0: as many as are fastest (`TeamSize`)

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
        given = [(pages.tensor, pages.head_dim, pages.type, table) for pages, table in caches]
        result = torch.empty((len(step.kept), self.width), dtype=torch.float32, device="cpu")
        with self._lock:  # from two threads, one waits
            if len(given) != len(self._caches) or any(
                a[0] is not b[0] or a[3] != b[3] for a, b in zip(given, self._caches, strict=True)
            ):
                self._program.set_caches(given)
                self._caches = given
            self._grow(int(step.positions.max()) + 1 if len(step.positions) else 0)

            def run(threads: int) -> None:
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

            run(threads) if threads else self._team.run(len(step.ids), run)
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


def _by_quantizer(
    linears: Sequence[Linear],
) -> list[tuple[_core.ActivationQuantizer | None, list[Linear]]]:
    """Part linears by what makes codes of their input; None: they take it in float."""
    parts: list[tuple[_core.ActivationQuantizer | None, list[Linear]]] = []
    for linear in linears:
        layer = linear.layer
        quantizer = layer._quantizer if isinstance(layer, QuantLinear) else None
        for known, part in parts:
            if known == quantizer:
                part.append(linear)
                break
        else:
            parts.append((quantizer, [linear]))
    return parts


def _packed(layer: QuantLinear, linear: Linear) -> tuple[Tensor, None]:
    """Return the strips of a part of a layer, whose biases are in them."""
    if linear.begin % _STRIP:
        raise SqCpuError(f"a part of a linear begins with row {linear.begin}, within a strip")
    strip = _core.packed_bytes(_STRIP, layer.in_features)
    strips = slice(linear.begin // _STRIP * strip, -(-linear.end // _STRIP) * strip)
    return layer.packed[strips], None


def _floats(layer: nn.Linear, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight, as the model has it, and the bias, fp32, of a part of a layer."""
    rows = slice(linear.begin, linear.end)
    bias = None if layer.bias is None else layer.bias.detach()[rows].float().contiguous()
    return layer.weight.detach()[rows].contiguous(), bias


def _norm(norm: Norm) -> tuple[_core.NormKind, Tensor | None, Tensor | None, float]:
    return getattr(_core.NormKind, norm.kind), norm.weight, norm.bias, norm.eps
