"""The rows that a search looks at, as the quantized part of the model before them makes them.

Blocks are tuned in their order. Before a block is tuned, the calibration batches run through it, on
the hidden states that the quantized blocks before it gave. The rows that the calibration sampled
are taken again there. Ranges and gradients stay those of the float model: the linears are quantized
with those ranges. The rows of a prefix stay those of the float model, too, as its keys and values
do in the quantized one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.calibration.sampling import SampledRows
from sq_cpu.errors import SqCpuError
from sq_cpu.models.block_chain import BlockCalls, BlockChain
from sq_cpu.models.calls import Batch, evaluating, model_inputs
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.models.padding import Padding
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.smoothing.scales import WeightStatistics, group_statistics
from sq_cpu.tuning.simulation import simulating

__all__ = ["QuantizedPrefix", "is_inside"]


def is_inside(group: SmoothingGroup, block: str) -> bool:
    """Say whether a group's linears are in a block, given by its full name."""
    return group.consumers[0].startswith(f"{block}.")


class _Rows(NamedTuple):
    which: Tensor
    """Bool [batch * tokens]."""
    values: Tensor


class QuantizedPrefix:
    """A linearized model, quantized up to a block, on the batches of its calibration.

    It keeps the hidden states of every batch between two blocks, and one block's quantized weights
    in fp32.

    Raises
    ------
    SqCpuError
        For a model whose blocks are not one chain, other batches than those of the calibration,
        and a calibration that does not know where its rows were.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        batches: Iterable[Batch],
        groups: Mapping[str, SmoothingGroup],
        scheme: Scheme,
        weights: WeightStatistics | None = None,
    ) -> None:
        if not calibration.rows_seen:
            raise SqCpuError(
                "the calibration is of an earlier version, which did not keep the rows' places: "
                "calibrate again"
            )
        self._model = model
        self._calibration = calibration
        self._groups = groups
        self._scheme = scheme
        self._padding = Padding()
        """Of the call whose linears are simulated, if it has a prefix."""
        self._weights = weights or WeightStatistics()
        self._chain = BlockChain(model, otherwise="tune it with sequential=False")
        given = list(model_inputs(model, batches, "tuning", "reading batches", False))
        with evaluating(model):
            self._chain.probe(given[0])
            self._calls = self._chain.capture(given)
        for call in self._calls:
            call.padding = call.padding.with_prefix(calibration.prefix)
        self._tokens = sum(_tokens(self._chain, call) for call in self._calls)
        if len(given) != calibration.batches or self._tokens not in calibration.rows_seen.values():
            raise SqCpuError(
                f"these {len(given)} batches have {self._tokens} tokens, and are not the "
                f"{calibration.batches} that were calibrated on: pass those"
            )

    def blocks(
        self, tuned: Mapping[str, GroupPlan], layers: Mapping[str, LayerPlan]
    ) -> Iterator[tuple[str, Calibration]]:
        """Yield each block's full name, and the calibration with the rows that it takes.

        When the next is asked for, `tuned` has the plans of all groups in this one, and `layers`
        the overrides of its linears.
        """
        hidden = [call.take() for call in self._calls]
        for index, block in enumerate(self._chain.names):
            linears = {
                name: self._model.get_submodule(name)
                for name in self._calibration.channel_min
                if name.startswith(f"{block}.")
            }
            sampled = SampledRows(self._calibration, self._tokens)
            in_float: list[_Rows | None] = []
            with evaluating(self._model), watching_inputs(linears, "input", sampled.observe):
                for call, states in zip(self._calls, hidden, strict=True):
                    padding = self._chain.padding(index, call, states)
                    with sampled.batch(padding):
                        made = self._chain.run(index, call, states)
                        in_float.append(self._prefix_rows(made, padding))
            yield block, sampled.calibration()
            if block == self._chain.names[-1]:
                return  # no block takes what it gives
            overrides = SmoothPlan((), tuple(layers.values()))
            plans = [planned for n, planned in tuned.items() if is_inside(self._groups[n], block)]
            statistics = {
                planned.name: group_statistics(
                    self._model,
                    self._groups[planned.name],
                    self._calibration,
                    self._scheme,
                    overrides,
                    self._weights,
                )
                for planned in plans
            }
            with (
                evaluating(self._model),
                simulating(self._model, statistics, plans, hold=True, counted=self._kept),
            ):
                for number, (call, rows) in enumerate(zip(self._calls, in_float, strict=True)):
                    hidden[number] = self._simulated(index, call, hidden[number], rows)

    def _simulated(
        self, index: int, call: BlockCalls, hidden: Tensor, in_float: _Rows | None
    ) -> Tensor:
        """Return what a block makes whose linears are simulated, with some rows put into it."""
        if in_float is None:
            return self._chain.run(index, call, hidden)
        self._padding = self._chain.padding(index, call, hidden)
        with self._padding.tracing():
            made = self._chain.run(index, call, hidden)
        # Also behind linears whose rows nobody can tell apart, as experts'.
        made = made.contiguous()
        made.view(-1, made.shape[-1])[in_float.which] = in_float.values
        return made

    def _kept(self, x: Tensor) -> Tensor | None:
        return self._padding.kept(x)

    def _prefix_rows(self, made: Tensor, padding: Padding) -> _Rows | None:
        """Return the rows of hidden states that stay those of the float model: a prefix's."""
        kept = padding.kept(made) if self._calibration.prefix else None
        if kept is None:
            return None
        return _Rows(~kept, made.reshape(-1, made.shape[-1])[~kept])


def _tokens(chain: BlockChain, call: BlockCalls) -> int:
    """Return the tokens of a batch, padding not counted."""
    padding = chain.padding(0, call, call.hidden)
    with padding.tracing():
        kept = padding.kept(call.hidden)
    return call.hidden.shape[:-1].numel() if kept is None else int(kept.sum())
