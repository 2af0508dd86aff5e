"""What is quantized and how: `Scheme`, and the paper's presets O1, O2 and O3."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from sq_cpu.errors import SqCpuError

__all__ = ["Activations", "Scheme"]

Activations = Literal["per_token", "per_token_x2", "per_tensor", "static"]
Weights = Literal["per_channel", "per_tensor", "per_rows"]
StaticRange = Literal["auto", "minmax", "percentile", "mse"]
Unreached = Literal["float", "quantize"]

# SmoothQuant (arXiv 2211.10438), table 2. Its O1..O3 differ in the activations alone.
_PRESETS: dict[str, Activations] = {"O1": "per_token", "O2": "per_tensor", "O3": "static"}

# Fields that a preset leaves open.
_BESIDE_PRESETS = ("ignore", "unreached", "dynamic_fallback")

# What fields were called in files of earlier versions.
_RENAMED = {"weight_group_rows": "rows_per_scale"}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How linears are quantized: int8 weights, 8-bit (or 7-bit) activations, int32 sums.

    Raises `SqCpuError` for a value that is not one of those listed.
    """

    activations: Activations = "per_token"
    """Granularity of the activation scale: one per row or one per call (both found while running),
    or one per layer, fixed by calibration. `"per_token_x2"` adds a second int8 term, the codes of
    what the first leaves over: 15 bits for twice the products, as bf16x2 does it for fp32."""
    weights: Weights = "per_channel"
    """Granularity of the weight scale: one per output channel, one per weight matrix, or one per
    so many consecutive output channels (the groups of ZeroQuant, arXiv 2206.01861)."""
    rows_per_scale: int = 64
    """Output channels that share a scale, for `"per_rows"` weights; the last ones may be fewer."""
    symmetric: bool = True
    """Activations: a range centred on 0 with a fixed zero point, or min..max with its own."""
    outlier_threshold: float | None = None
    """Input channels whose absmax reaches this stay in float, the others are int8: the
    decomposition of LLM.int8() (arXiv 2208.07339), which takes 6.0. For symmetric per-token
    activations; None decomposes nothing."""
    reduce_range: bool | Literal["auto"] = False
    """7-bit activations, so that the saturating int16 pair sums of AVX2 and AVX-512 BW stay exact
    (`count_saturation` counts those that would not). `"auto"`: only where the processor has no
    VNNI; `resolve` decides."""
    static_range: StaticRange = "auto"
    """What static activations cover (see `sq_cpu.numerics.ranges`). "auto": 19 of 20 of the sampled
    rows, as the others get scales of their own; without `dynamic_fallback` or sampled rows,
    "minmax". "minmax": all that calibration saw, for layers that pass codes to the next
    (`QuantLinear.forward_int8`), where every row keeps the static scale. "percentile": that of the
    sampled values; "mse": the clip with the least squared error on them."""
    percentile: float = 99.99
    """Share of the values, in percent, that a `"percentile"` range keeps; in (50, 100]."""
    dynamic_fallback: bool = True
    """Static activations: a row of which some value lies beyond the grid (it clips), or whose codes
    span less than an eighth of the grid (it underflows), gets its own scale, as `"per_token"` gives
    it. The others keep the static one. No effect where codes pass from layer to layer
    (`QuantLinear.forward_int8`), as no step there sees a whole row, nor on other activations."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Linears left alone: an entry is the path of a linear, or of a module that holds some, or the
    end of such a path. "lm_head" also stands for the output embeddings, whatever their name."""
    unreached: Unreached = "float"
    """Linears that no batch of the calibration called: in float, or quantized all the same, without
    smoothing. Static ones stay in float either way. A model that is quantized without a calibration
    has none."""

    def __post_init__(self) -> None:
        if str(self.weights) == "per_group":
            raise SqCpuError("scheme: weights='per_group' is now 'per_rows', with rows_per_scale")
        _check("activations", self.activations, get_args(Activations))
        _check("weights", self.weights, get_args(Weights))
        _check("symmetric", self.symmetric, (True, False))
        _check_threshold(self)
        _check("reduce_range", self.reduce_range, (False, True, "auto"))
        _check("dynamic_fallback", self.dynamic_fallback, (True, False))
        _check("static_range", self.static_range, get_args(StaticRange))
        _check("unreached", self.unreached, get_args(Unreached))
        self._check_rows_per_scale()
        self._check_static_range()
        names = self.ignore if isinstance(self.ignore, tuple | list) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise SqCpuError(
                f"scheme: ignore is a tuple of layer names, as in ('lm_head',); not {self.ignore!r}"
            )
        object.__setattr__(self, "ignore", tuple(names))

    def _check_rows_per_scale(self) -> None:
        rows = self.rows_per_scale
        if type(rows) is not int or rows < 1:
            raise SqCpuError(f"scheme: rows_per_scale={rows!r} is not a positive integer")
        if self.weights != "per_rows" and rows != Scheme.rows_per_scale:
            raise SqCpuError(
                f"scheme: rows_per_scale={rows} has no effect on {self.weights} weights; "
                "drop it or set weights='per_rows'"
            )

    def _check_static_range(self) -> None:
        percentile = self.percentile
        if type(percentile) not in (int, float) or not 50 < percentile <= 100:
            raise SqCpuError(f"scheme: percentile={percentile!r} is not a number in (50, 100]")
        object.__setattr__(self, "percentile", float(percentile))
        if self.static_range != "auto" and self.activations != "static":
            raise SqCpuError(
                f"scheme: static_range={self.static_range!r} has no effect on "
                f"{self.activations} activations; drop it or set activations='static'"
            )
        if self.static_range != "percentile" and percentile != Scheme.percentile:
            raise SqCpuError(
                f"scheme: percentile={percentile} has no effect on static_range="
                f"{self.static_range!r}; drop it or set static_range='percentile'"
            )

    @classmethod
    def of(cls, scheme: str | Scheme, **overrides: Any) -> Scheme:
        """Return the preset of that name, or the scheme itself, with `overrides` applied."""
        if isinstance(scheme, str):
            if scheme not in _PRESETS:
                raise SqCpuError(
                    f"unknown scheme {scheme!r}; known are {', '.join(_PRESETS)}, or pass a Scheme"
                )
            scheme = cls(activations=_PRESETS[scheme])
        elif not isinstance(scheme, Scheme):
            raise SqCpuError(
                f"scheme must be one of {', '.join(_PRESETS)} or a Scheme, not {scheme!r}"
            )
        _check_fields(overrides)
        return replace(scheme, **overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scheme:
        """Rebuild what `to_dict` gave, also by earlier versions; absent fields take defaults.

        But earlier versions quantized what no batch had reached, had no `dynamic_fallback`, and
        called a range "minmax" also where it has no effect.
        """
        before: dict[str, Any] = {
            "unreached": "quantize",
            "static_range": "minmax",
            "dynamic_fallback": False,
        }
        values = before | dict(values)
        if values["static_range"] == "minmax" and values.get("activations") != "static":
            values["static_range"] = "auto"
        if values.get("weights") == "per_group":
            values["weights"] = "per_rows"
        for old, new in _RENAMED.items():
            if old in values and new not in values:
                values[new] = values.pop(old)
        _check_fields(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self) | {"ignore": list(self.ignore)}

    def resolve(self, has_vnni: bool) -> Scheme:
        """Return the scheme with `reduce_range="auto"` decided for a processor."""
        if self.reduce_range != "auto":
            return self
        return replace(self, reduce_range=not has_vnni)

    def with_activations(self, activations: Activations) -> Scheme:
        """Return the scheme of a layer with other activations.

        Fields that would have no effect on them (`static_range`, `percentile`,
        `outlier_threshold`) take their defaults.
        """
        if activations == self.activations:
            return self
        return replace(
            self,
            activations=activations,
            static_range="auto",
            percentile=Scheme.percentile,
            outlier_threshold=None,
        )

    @property
    def name(self) -> str:
        """The preset that this scheme equals, whatever it leaves in float; otherwise `"custom"`.

        Presets of earlier versions had no `dynamic_fallback`, and static ranges by min/max.
        """
        this = replace(self, static_range="auto") if self.static_range == "minmax" else self
        for name, activations in _PRESETS.items():
            preset = Scheme(activations=activations)
            if this == replace(preset, **{key: getattr(self, key) for key in _BESIDE_PRESETS}):
                return name
        return "custom"

    @property
    def needs_calibration(self) -> bool:
        """Whether the layers rest on what a calibration saw, smoothed or not."""
        return self.activations == "static" or self.outlier_threshold is not None

    @property
    def qmax(self) -> int:
        """Largest symmetric activation code: 127, or 63 with `reduce_range`."""
        return 63 if self._reduced else 127

    @property
    def levels(self) -> int:
        """Steps of the asymmetric activation grid: 255, or 127 with `reduce_range`."""
        return 127 if self._reduced else 255

    @property
    def zero_point(self) -> int:
        """What is added to a symmetric activation code to store it as u8: 128 or 64."""
        return self.qmax + 1

    @property
    def terms(self) -> int:
        """Rows of codes that add up to a row of activations: 1, or 2 for `"per_token_x2"`."""
        return 2 if self.activations == "per_token_x2" else 1

    @property
    def _reduced(self) -> bool:
        if self.reduce_range == "auto":
            raise SqCpuError(
                'scheme: reduce_range is "auto"; resolve(has_vnni) it to get its integer grid'
            )
        return self.reduce_range


def _check(field: str, value: object, allowed: tuple[object, ...]) -> None:
    # By type too: 1 == True, and a Scheme that says 1 would not equal its own JSON.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise SqCpuError(f"scheme: {field}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _check_threshold(scheme: Scheme) -> None:
    threshold = scheme.outlier_threshold
    if threshold is None:
        return
    if type(threshold) not in (int, float) or not 0 < threshold <= sys.float_info.max:
        raise SqCpuError(
            f"scheme: outlier_threshold={threshold!r} is not a positive number, as in 6.0, or None"
        )
    if scheme.activations != "per_token" or not scheme.symmetric:
        raise SqCpuError(
            "scheme: outlier_threshold is for symmetric per_token activations; drop it, or set "
            "activations='per_token' and symmetric=True"
        )
    object.__setattr__(scheme, "outlier_threshold", float(threshold))


def _check_fields(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Scheme)]
    for name in values:
        if name in _RENAMED:
            raise SqCpuError(f"scheme: {name} is now {_RENAMED[name]}")
        if name not in known:
            raise SqCpuError(f"scheme: no field {name!r}; the fields are {', '.join(known)}")
