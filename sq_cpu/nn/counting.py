"""How many rows did not fit the static scales of a model, counted while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sq_cpu.nn.linear import QuantLinear

__all__ = ["RowCounts", "row_counts"]


@dataclass(frozen=True)
class RowCounts:
    """Rows of a static layer's input, since it was made or its counts were last reset."""

    rows: int
    """Those that were quantized, rows of padding included."""
    clipped: int
    """Of these, rows with a value beyond the static grid."""
    underflowed: int
    """Of these, rows whose codes span less than an eighth of the grid."""
    chained: int
    """Beside these, rows that came as codes from `QuantLinear.forward_int8`, so that none was
    looked at, nor has its own scale."""

    @property
    def share(self) -> float:
        """Return the share of the rows that clipped or underflowed; 0 when there are none.

        With `Scheme.dynamic_fallback` these had their own scale.
        """
        return (self.clipped + self.underflowed) / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return vars(self) | {"share": self.share}


def row_counts(model: nn.Module, *, reset: bool = False) -> dict[str, RowCounts]:
    """Return what each int8 linear of static activations has counted, by its full name.

    Every call counts, also in other threads and of a fused model. Of linears that share one
    quantized input, as q, k and v do in a fused model, the first counts its rows. Calls that torch
    traces or takes gradients of do not count. A copy of a model, also one that was saved and
    loaded, begins at 0.

    Parameters
    ----------
    reset : start at 0 again, so that the next reading tells of the rows in between
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {
        name: RowCounts(*layer._quantizer.row_counts(reset))
        for name, layer in layers.items()
        if layer.static is not None
    }
