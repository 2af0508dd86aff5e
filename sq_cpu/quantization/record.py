"""What was done to a model: the value that a quantized model and its checkpoint carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sq_cpu.errors import SqCpuError
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = ["QuantizationRecord", "QuantizedPart"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class QuantizationRecord:
    """What was done to a model, kept as `model.sq_cpu_config` and in its checkpoint."""

    scheme: Scheme
    plan: SmoothPlan | None
    """As it was carried out; None for a model that was not smoothed."""
    layers: tuple[str, ...]
    """Full names of the quantized linears."""
    smoothed: tuple[str, ...] = ()
    """Full names of those that divide their input by a smoothing scale of their own."""
    decomposed: Mapping[str, int] = field(default_factory=dict)
    """Full names of those that are a `DecomposedLinear`, and how many channels each has in float.
    """
    hadamard: Mapping[str, int] = field(default_factory=dict)
    """Full names of those that are rotated (`GroupPlan.hadamard`), and the columns of a block."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Linears left in float, by full name, and why."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """What the model computes in around those quantized linears where that is not its own dtype, by
    full name (T5 has some in fp32)."""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    """Embeddings that read the weight of a quantized linear, the head: full name -> the head's."""
    prefix: tuple[int, ...] = ()
    """The first tokens of texts whose keys and values are the float model's (`Prefix`)."""
    misfits: Mapping[str, float] = field(default_factory=dict)
    """Share of the calibration's sampled rows that do not fit the static scale of a layer (that
    clip or underflow, see `RowCounts`), by full name. Layers without such rows have none."""

    def layer_scheme(self, name: str) -> Scheme:
        """Return the scheme of a quantized linear."""
        return self.scheme if self.plan is None else self.plan.layer_scheme(self.scheme, name)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types; the last eight only where there are such layers."""
        plan = None if self.plan is None else self.plan.to_dict()
        tables: dict[str, Any] = {
            "smoothed": list(self.smoothed),
            "decomposed": dict(self.decomposed),
            "hadamard": dict(self.hadamard),
            "kept": dict(self.kept),
            "dtypes": dict(self.dtypes),
            "embeddings": dict(self.embeddings),
            "prefix": list(self.prefix),
            "misfits": dict(self.misfits),
        }
        return {
            "scheme": self.scheme.to_dict(),
            "plan": plan,
            "layers": list(self.layers),
            **{name: table for name, table in tables.items() if table},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationRecord:
        """Rebuild what `to_dict` gave, from a mapping that may hold more; else `SqCpuError`."""
        try:
            scheme, plan, layers = values["scheme"], values["plan"], values["layers"]
        except KeyError as error:
            raise SqCpuError(f"the quantization record has no field {error}") from error
        dtypes = dict(values.get("dtypes", {}))
        if unknown := sorted(set(map(str, dtypes.values())) - set(_DTYPES)):
            raise SqCpuError(
                f"the quantization record has the dtype {unknown[0]!r}, not one of "
                f"{', '.join(_DTYPES)}; save the model again"
            )
        return cls(
            scheme=Scheme.from_dict(scheme),
            plan=None if plan is None else SmoothPlan.from_dict(plan),
            layers=tuple(layers),
            smoothed=tuple(values.get("smoothed", ())),
            decomposed=dict(values.get("decomposed", {})),
            hadamard=dict(values.get("hadamard", {})),
            kept=dict(values.get("kept", {})),
            dtypes=dtypes,
            embeddings=dict(values.get("embeddings", {})),
            prefix=tuple(values.get("prefix", ())),
            misfits=dict(values.get("misfits", {})),
        )


@dataclass(frozen=True)
class QuantizedPart:
    """What was done to some of a model's linears."""

    plan: SmoothPlan | None
    layers: tuple[str, ...]
    smoothed: tuple[str, ...]
    decomposed: Mapping[str, int]
    hadamard: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    """Those that stay in float for what the calibration says, and why."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    misfits: Mapping[str, float] = field(default_factory=dict)

    def record(self, scheme: Scheme, kept: Mapping[str, str]) -> QuantizationRecord:
        """Return the record of a model of which this is all; `kept` are the others in float."""
        return QuantizationRecord(
            scheme=scheme,
            plan=self.plan,
            layers=self.layers,
            smoothed=self.smoothed,
            decomposed=self.decomposed,
            hadamard=self.hadamard,
            kept={**kept, **self.kept},
            dtypes=self.dtypes,
            embeddings=self.embeddings,
            misfits=self.misfits,
        )
