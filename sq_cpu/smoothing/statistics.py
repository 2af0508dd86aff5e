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
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.scheme import Scheme

__all__ = ["GroupStatistics", "live_median", "output_errors"]


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
    hadamard: int = 0
    """Columns of a block that is rotated, 0: none."""

    @property
    def can_rotate(self) -> bool:
        """Whether there is what the static range of rotated rows is found on."""
        return all(
            (sample.scheme or self.scheme or Scheme()).activations != "static"
            or (sample.peaks is not None and len(sample.peaks) > 0)
            for sample in self.samples
        )

    def fake_quantized(self, s: Tensor) -> Iterator[FakeQuantizedLinear]:
        """Yield each linear that will be quantized, with the smoothing scale s, fp32 [channels].

        Raises `SqCpuError` without a scheme or samples.
        """
        if self.scheme is None or not self.samples:
            raise SqCpuError(
                "the output error needs a scheme and linears that it quantizes: pass the scheme, "
                "and leave out groups that it ignores"
            )
        wide = self.widen(s)
        for sample in self.samples:
            scheme = sample.scheme or self.scheme
            yield FakeQuantizedLinear(sample, wide, scheme, self.clip, self.hadamard)


@torch.no_grad()
def output_errors(statistics: GroupStatistics, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return what smoothing by s and quantizing do to the outputs, and the outputs, squared.

    They are |Q(X / s) Q(W s)^T - X W^T|^2 and |X W^T|^2 over the sampled rows, fp64 [samples] each,
    in the kernels' numerics; s is fp32 [channels].

    Raises `SqCpuError` when the statistics have no scheme, no linear that is quantized, or no
    sampled rows.
    """
    errors, outputs = [], []
    for linear in statistics.fake_quantized(s):  # one quantized weight at a time
        errors.append(linear.squared_error())
        outputs.append(linear.sample.squared_output())
    return torch.stack(errors), torch.stack(outputs)


def live_median(absmax: Tensor) -> Tensor | None:
    """Return the median of the channels' absmax, dead ones not counted; None where all are dead."""
    alive = absmax[absmax > 0]
    return alive.median() if len(alive) else None
