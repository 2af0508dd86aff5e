"""What the smoothing rules look at: the statistics of a group, and its error for a scale.

Nothing here knows of models. All is computed in fp32 or better, whatever the dtype of rows and
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.fake_quant import LinearSample, quantized_output
from sq_cpu.scheme import Scheme

__all__ = ["GroupStatistics", "output_deltas", "output_errors"]


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What the rules may look at: a group of linears with one input X, before smoothing.

    Channels are those of the group's producer; `widen` repeats them to the linears' input
    channels, where grouped-query attention has fewer of the former.
    """

    act_absmax: Tensor
    """max|X_j|, fp32 [channels]."""
    weight_absmax: Tensor
    """max|W_j| over all linears of the group, fp32 [channels]."""
    norm_weight: Tensor | None = None
    """gamma of the norm that makes X, any offset added, fp32 [channels]; None without a norm."""
    samples: tuple[LinearSample, ...] = ()
    """The linears of the group that will be quantized."""
    scheme: Scheme | None = None
    """How they will be, resolved."""
    widen: Callable[[Tensor], Tensor] = lambda s: s
    """[channels] -> [in_features]."""
    clip: float = 1.0
    """Fraction of the found range that a static scale covers."""

    def quantized(self) -> Iterator[tuple[LinearSample, Scheme]]:
        """Yield each sample with its scheme; `SqCpuError` without a scheme or samples."""
        if self.scheme is None or not self.samples:
            raise SqCpuError(
                "the output error needs a scheme and linears that it quantizes: pass the scheme, "
                "and leave out groups that it ignores"
            )
        for sample in self.samples:
            yield sample, sample.scheme or self.scheme


@torch.no_grad()
def output_errors(statistics: GroupStatistics, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of what `output_deltas` yields, and of the outputs.

    They are |Q(X / s) Q(W s)^T - X W^T|^2 and |X W^T|^2 over the sampled rows, fp64 [samples] each.
    Raises as `output_deltas`.
    """
    pairs = [(delta, sample.output) for sample, delta in output_deltas(statistics, s)]
    errors, outputs = zip(*pairs, strict=True)
    return _squares(errors), _squares(outputs)


@torch.no_grad()
def output_deltas(statistics: GroupStatistics, s: Tensor) -> Iterator[tuple[LinearSample, Tensor]]:
    """Yield what smoothing by s and quantizing do to the outputs, in the kernels' numerics.

    Parameters
    ----------
    s : fp32 [channels]

    Yields
    ------
    each sample and Q(X / s) Q(W s)^T - X W^T over its rows, fp32 [rows, out_features]

    Raises
    ------
    SqCpuError
        When the statistics have no scheme, no linear that is quantized, or no sampled rows.
    """
    s = statistics.widen(s)
    for sample, scheme in statistics.quantized():
        y = quantized_output(sample.inputs(), sample, s, scheme, statistics.clip)
        yield sample, y - sample.output


def _squares(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors])
