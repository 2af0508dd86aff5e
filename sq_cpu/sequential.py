"""The rows that a search looks at, as the quantized part of the model before them makes them.

Blocks are tuned in their order. The calibration batches, which the blocks before have taken through
their quantized selves, run through a block before it is tuned, and the rows that the calibration
sampled are taken again there. Ranges and gradients stay those of the float model: by those ranges
the linears are quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from sq_cpu.block_chain import BlockChain
from sq_cpu.calibrate import Batch, evaluating, model_inputs
from sq_cpu.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.groups import SmoothingGroup
from sq_cpu.inputs import SampledRows, watching_inputs
from sq_cpu.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.scheme import Scheme
from sq_cpu.simulation import simulating
from sq_cpu.smooth import group_statistics

__all__ = ["QuantizedPrefix"]


class QuantizedPrefix:
    """A linearized model, quantized up to a block, on the batches of its calibration.

    Held are the batches' hidden states between two blocks, and one block's quantized weights in
    fp32.

    Raises
    ------
    SqCpuError
        For a model whose blocks are not one chain, batches that `calibrate` refuses, and a
        calibration that does not know where its rows were.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        batches: Iterable[Batch],
        groups: Mapping[str, SmoothingGroup],
        scheme: Scheme,
    ) -> None:
        known = calibration.row_places.keys() | calibration.gradient_places.keys()
        if (calibration.rows.keys() | calibration.gradient_rows.keys()) - known:
            raise SqCpuError(
                "the calibration is of an earlier version, which did not keep the rows' places: "
                "calibrate again"
            )
        self._model = model
        self._calibration = calibration
        self._groups = groups
        self._scheme = scheme
        self._chain = BlockChain(model, otherwise="tune it with sequential=False")
        given = list(model_inputs(model, batches, "tuning", "reading batches", False))
        with evaluating(model):
            self._chain.probe(given[0])
            self._calls = self._chain.capture(given)

    def blocks(
        self, tuned: Mapping[str, GroupPlan], layers: Mapping[str, LayerPlan]
    ) -> Iterator[tuple[str, Calibration]]:
        """Yield each block's full name, and the calibration with the rows that it takes.

        When the next is asked for, `tuned` has the plans of all groups in this one, and `layers`
        of its linears that depart. Raises `SqCpuError` for other batches than those of the
        calibration.
        """
        hidden = [call.hidden for call in self._calls]
        for index, block in enumerate(self._chain.names):
            linears = {
                name: self._model.get_submodule(name)
                for name in self._calibration.channel_min
                if name.startswith(f"{block}.")
            }
            sampled = SampledRows(self._calibration)
            with evaluating(self._model), watching_inputs(linears, "input", sampled.see):
                for call, states in zip(self._calls, hidden, strict=True):
                    with sampled.batch(call.mask):
                        self._chain.run(index, call, states)
            if linears and sampled.tokens != self._calibration.tokens:
                raise SqCpuError(
                    f"the batches have {sampled.tokens} tokens and those of the calibration had "
                    f"{self._calibration.tokens}: pass the same"
                )
            yield block, sampled.calibration()
            departing = SmoothPlan((), tuple(layers.values()))
            plans = [
                tuned[name]
                for name, group in self._groups.items()
                if name in tuned and group.consumers[0] in linears
            ]
            statistics = {
                planned.name: group_statistics(
                    self._model,
                    self._groups[planned.name],
                    self._calibration,
                    self._scheme,
                    departing,
                )
                for planned in plans
            }
            with evaluating(self._model), simulating(self._model, statistics, plans):
                hidden = [
                    self._chain.run(index, call, states)
                    for call, states in zip(self._calls, hidden, strict=True)
                ]
