"""How often vpmaddubsw would saturate: what `Scheme.reduce_range` is about, for a model and data.

The int8 product of processors without VNNI (AVX2, AVX-512 BW) adds two neighbouring products in
int16, u[2j] w[2j] + u[2j+1] w[2j+1], and clips the sum. sq_cpu's kernels never clip: they use it
for 7-bit activations only, whose sums fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.ops import QuantizedActivation
from sq_cpu.models.calls import Batch, evaluating, model_inputs
from sq_cpu.models.checks import check_is_module
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.nn.linear import QuantLinear

__all__ = ["Saturation", "SaturationCount", "count_saturation"]


@dataclass(frozen=True)
class SaturationCount:
    """Pairs of neighbouring products, and how many of their sums int16 cannot hold."""

    pairs: int
    saturated: int

    @property
    def share(self) -> float:
        """Return saturated / pairs; 0 when there are none."""
        return self.saturated / self.pairs if self.pairs else 0.0

    def to_dict(self) -> dict[str, float]:
        """Return what `json.dumps` takes."""
        return {"pairs": self.pairs, "saturated": self.saturated, "share": self.share}


@dataclass(frozen=True)
class Saturation:
    """The counts of every int8 linear, by its full name, over all batches."""

    layers: Mapping[str, SaturationCount]

    @property
    def total(self) -> SaturationCount:
        """Return the sum over the layers."""
        counts = self.layers.values()
        return SaturationCount(sum(c.pairs for c in counts), sum(c.saturated for c in counts))

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        layers = {name: count.to_dict() for name, count in self.layers.items()}
        return {"total": self.total.to_dict(), "layers": layers}


def count_saturation(
    model: nn.Module, batches: Iterable[Batch], *, progress: bool | None = None
) -> Saturation:
    """Run a quantized model over `batches` and count the pairs that vpmaddubsw would clip.

    A linear of [out_features, in_features] has out_features * ceil(in_features / 2) pairs for every
    row of its input, rows of padding included. The counts are exact and the same on every
    processor. A layer that no batch reaches through its call has none; `forward_int8` is not
    counted. Batches, `progress` and the model's state are as in `calibrate`.

    Raises `SqCpuError` when the model has no int8 linear, and for batches that `calibrate` refuses.
    """
    check_is_module(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not linears:
        raise SqCpuError("no int8 linear in the model: quantize it first")
    counts = dict.fromkeys(linears, (0, 0))

    def count(name: str, x: Tensor | QuantizedActivation) -> None:
        pairs, saturated = linears[name].count_saturation(x)
        before = counts[name]
        counts[name] = (before[0] + pairs, before[1] + saturated)

    with evaluating(model), watching_inputs(linears, "x", count):
        for args, kwargs in model_inputs(model, batches, "saturation", "counting", progress):
            model(*args, **kwargs)
    return Saturation({name: SaturationCount(*found) for name, found in counts.items()})
