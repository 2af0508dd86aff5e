"""Whether the inputs of a model still look like those that it was calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.nn.counting import row_counts
from sq_cpu.quantization.record import QuantizationRecord

__all__ = ["ENOUGH_ROWS", "Drift", "drift"]

ENOUGH_ROWS = 256
"""Fewer tell nothing: one unusual text has so many."""
_RISE = 4
# A share is that of 64 sampled rows, so 0 of them may be one in 64 of all.
_LEAST_SHARE = 1 / 64


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

    @property
    def share(self) -> float:
        """Return the share of the rows that do not fit; 0 when there are none."""
        return self.misfits / self.rows if self.rows else 0.0

    @property
    def drifts(self) -> bool:
        """Tell whether over four times as many rows do not fit as in calibration.

        Of 256 rows or more; a calibrated share below one in 64 counts as that, which its sample
        cannot tell from 0. Where it is unknown, or a quarter and more, nothing is drift.
        """
        if self.calibrated is None or self.rows < ENOUGH_ROWS:
            return False
        return self.share > _RISE * max(self.calibrated, _LEAST_SHARE)

    def since(self, before: Drift) -> Drift:
        """Return the same of the rows since an earlier reading of the layer."""
        return Drift(self.rows - before.rows, self.misfits - before.misfits, self.calibrated)

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
        found[name] = Drift(counts.rows, misfits, record.misfits.get(name))
    return found
