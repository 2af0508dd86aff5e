"""Whether the inputs of a model still look like those that it was calibrated on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.nn.counting import row_counts
from sq_cpu.numerics.ranges import fits_rows
from sq_cpu.quantization.record import QuantizationRecord

__all__ = ["ENOUGH_ROWS", "Drift", "drift"]

ENOUGH_ROWS = 256
"""Fewer tell nothing: one unusual text has so many."""
_RISE = 4
# A share is that of 64 sampled rows, so 0 of them may be one in 64 of all. A range that 19 of 20 of
# them fit leaves 4 out, whatever they are: of other rows, of text of the same kind, up to 14 (22 %
# in the worst of SmolLM2's 210 layers, and 6 % in the median).
_LEAST_SHARE, _LEFT_OUT = 1 / 64, 4 / 64


@dataclass(frozen=True)
class Drift:
    """How rows fit the static scale of a layer, and how calibration's did."""

    rows: int
    """Those that were quantized, as `RowCounts.rows`."""
    misfits: int
    """Of these, rows that clipped or underflowed."""
    calibrated: float | None
    """The share of such rows in the calibration's sample; None where the model's record has none,
    as of a checkpoint of before format 9."""
    least: float = _LEAST_SHARE
    """What a lower calibrated share counts as: 1 in 64, which its sample cannot tell from 0; or 1
    in 16, where the static range leaves out one in 20 (`Scheme.static_range="auto"`)."""

    @property
    def share(self) -> float:
        """Return the share of the rows that do not fit; 0 when there are none."""
        return self.misfits / self.rows if self.rows else 0.0

    @property
    def drifts(self) -> bool:
        """Tell whether over four times as many rows do not fit as in calibration.

        Of 256 rows or more; a calibrated share below `least` counts as that. Where it is unknown,
        or a quarter and more, nothing is drift.
        """
        if self.calibrated is None or self.rows < ENOUGH_ROWS:
            return False
        return self.share > _RISE * max(self.calibrated, self.least)

    def since(self, before: Drift) -> Drift:
        """Return the same of the rows since an earlier reading of the layer."""
        return replace(self, rows=self.rows - before.rows, misfits=self.misfits - before.misfits)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return vars(self) | {"share": self.share, "drifts": self.drifts}


def drift(model: nn.Module, *, reset: bool = False) -> dict[str, Drift]:
    """Return how the rows of each layer of static activations fit its scale, by its full name.

    The rows are those that `row_counts` has, since the model was made or its counts were last
    reset: of every call, also in other threads and of a fused model. Of layers that share one
    quantized input, the first counts its rows; rows that come as codes are not looked at. Padding
    counts here, but not in calibration.

    Parameters
    ----------
    reset : start at 0 again, so that the next reading tells of the rows in between

    Raises
    ------
    SqCpuError
        For a model that is not quantized, and a `reset` that is no bool.
    """
    record = getattr(model, "sq_cpu_config", None)
    if not isinstance(record, QuantizationRecord):
        raise SqCpuError(f"the {type(model).__name__} is not quantized: call sq_cpu.quantize first")
    if not isinstance(reset, bool):
        raise SqCpuError(f"reset is {reset!r}; it is True or False")
    found = {}
    for path, counts in row_counts(model, reset=reset).items():
        name = path.removesuffix(".regular") if path not in record.layers else path
        misfits = counts.clipped + counts.underflowed
        least = _LEFT_OUT if fits_rows(record.layer_scheme(name)) else _LEAST_SHARE
        found[name] = Drift(counts.rows, misfits, record.misfits.get(name), least)
    return found
