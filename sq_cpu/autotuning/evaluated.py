"""One evaluated configuration: the value that evaluation, storage, search and report share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.parsing import check_fields, record

__all__ = ["EvaluatedConfiguration"]

# In JSON, which has no word for these, they are null.
_UNKNOWN = {
    "metric": math.nan,
    "loss": math.inf,
    "loss_percent": math.nan,
    "milliseconds": math.inf,
}


@dataclass(frozen=True, kw_only=True)
class EvaluatedConfiguration:
    """A configuration and what it is worth."""

    configuration: Configuration
    metric: float = _UNKNOWN["metric"]
    """NaN if it could not be scored."""
    loss: float = _UNKNOWN["loss"]
    """Against the float model: a fraction for a relative goal, else in the metric's unit. Infinite
    if the configuration could not be carried out or scored."""
    loss_percent: float = _UNKNOWN["loss_percent"]
    """The loss as a percentage of the float model's metric; NaN where that is 0, or no loss."""
    milliseconds: float = _UNKNOWN["milliseconds"]
    """Of all linears that can be int8, by the cost table."""
    in_float: int
    """Linears in float."""
    dynamic: int
    """Linears with per-token activations."""
    value: float
    """What the search minimizes."""
    error: str = ""
    """Why it could not be carried out or scored."""
    phase: str = ""
    """"search" or "refine"; empty before it is kept."""
    number: int = -1
    """Of its trial, within the phase."""

    @property
    def scored(self) -> bool:
        """Whether it has a loss that can be compared."""
        return math.isfinite(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return what a trial keeps beside the configuration, as JSON types."""
        numbers = {name: getattr(self, name) for name in _UNKNOWN}
        kept = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        kept |= {"in_float": self.in_float, "dynamic": self.dynamic, "value": self.value}
        return kept | {"error": self.error} if self.error else kept

    @classmethod
    def from_dict(
        cls, values: Any, configuration: Configuration, *, phase: str, number: int
    ) -> EvaluatedConfiguration:
        """Rebuild what `to_dict` gave, with what the trial adds; `SqCpuError` on anything else."""
        where = f"the result of trial {number}"
        stored = record(_Stored, values, where).__dict__
        known = {name: value for name, value in stored.items() if value is not None}
        return cls(**known, configuration=configuration, phase=phase, number=number)


@dataclass(frozen=True)
class _Stored:
    """The types that `to_dict` gives."""

    in_float: int
    dynamic: int
    value: float
    metric: float | None = None
    loss: float | None = None
    loss_percent: float | None = None
    milliseconds: float | None = None
    error: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "a result")
