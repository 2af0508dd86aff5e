"""What an autotuning chooses, a `Configuration`, and what it chooses from, a `SearchSpace`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast, get_args

from sq_cpu.autotuning.latency import Precision
from sq_cpu.errors import SqCpuError
from sq_cpu.parsing import check_fields, parsed_json, record
from sq_cpu.scheme import Activations, Scheme
from sq_cpu.smoothing.rules import RULES

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Configuration", "Ranked", "SearchSpace"]

Ranked = Callable[[Precision], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Settings for all linears, and the linears that override them; equal ones compare equal."""

    activations: Activations = "static"
    symmetric: bool = True
    static_range: str | float = "auto"
    """`Scheme.static_range`; a number is the percentile. Without effect, "auto"."""
    smoothing: str = "tuned"
    """"tuned": alpha of every group by `tune`; or a key of `rules.RULES` for all groups."""
    alpha: tuple[float, ...] = (0.0, 1.0)
    """The least and the greatest migration strength that `tune` tries; the one of "smoothquant";
    none for the rules without."""
    weight_clip: float = 1.0
    """`LayerPlan.weight_clip` of every int8 linear."""
    layers: tuple[tuple[str, Precision], ...] = ()
    """The linears that override `activations`, or are in float, by name."""

    def __post_init__(self) -> None:
        check_fields(self, "the configuration")
        changes = dict(self.layers)
        kept = {name: own for name, own in changes.items() if own != self.activations}
        object.__setattr__(self, "layers", tuple(sorted(kept.items())))
        object.__setattr__(self, "alpha", tuple(round(float(a), 6) for a in self.alpha))
        if self.activations != "static" and "static" not in kept.values():
            object.__setattr__(self, "static_range", "auto")

    @property
    def key(self) -> str:
        """Canonical JSON: two configurations are the same when their keys are."""
        values = asdict(self) | {"layers": dict(self.layers)}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Configuration:
        """Rebuild what `key` says; `SqCpuError` on anything else."""
        where = "the configuration"
        values = parsed_json(key, where)
        if not isinstance(values, dict) or not isinstance(values.get("layers"), dict):
            raise SqCpuError(f"{where} is not one of this version")
        return record(cls, values | {"layers": list(values["layers"].items())}, where)

    def settings(self) -> Configuration:
        """Return the settings alone, without the linears that override them."""
        return replace(self, layers=())

    def precision(self, name: str) -> Precision:
        """Return how a linear runs."""
        return dict(self.layers).get(name, self.activations)

    def overrides(self, precision: Precision) -> tuple[str, ...]:
        """Return the linears that override the settings with that precision."""
        return tuple(name for name, own in self.layers if own == precision)

    def changed(self, names: Sequence[str], precision: Precision) -> Configuration:
        """Return the configuration with another precision for some linears."""
        return replace(
            self, layers=tuple((dict(self.layers) | dict.fromkeys(names, precision)).items())
        )

    def scheme(self, ignore: tuple[str, ...]) -> Scheme:
        """Return the scheme of the linears that override nothing."""
        values: dict[str, Any] = {"activations": self.activations, "symmetric": self.symmetric}
        if self.activations == "static" and isinstance(self.static_range, str):
            values["static_range"] = self.static_range
        elif self.activations == "static":
            values |= {"static_range": "percentile", "percentile": self.static_range}
        return Scheme(ignore=ignore, **values)


def _number(value: object, low: float, high: float) -> bool:
    # JSON has both numbers and booleans, and numpy's float64 is a float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= cast(float, value) <= high


def _share_of_one(value: object) -> bool:
    return _number(value, 0.0, 1.0)


def _among(*choices: object) -> tuple[Callable[[Any], bool], str]:
    # By type too: 1 == True, but a configuration's key, which is JSON, tells them apart.
    def can_be(value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return can_be, f"one of {', '.join(map(repr, choices))}"


def _alpha_range(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and all(map(_share_of_one, value)) and value[0] <= value[1]


def _static_range(value: Any) -> bool:
    return value in ("auto", "minmax", "mse") or (_number(value, 50.0, 100.0) and value > 50)


def _weight_clip(value: Any) -> bool:
    return _share_of_one(value) and value > 0


# By field of a search space: what a choice can be, in code and in words.
_CHOICES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "activations": _among(*get_args(Activations)),
    "symmetric": _among(True, False),
    "static_range": (_static_range, "'auto', 'minmax', 'mse' or a percentile in (50, 100]"),
    "smoothing": _among("tuned", *RULES),
    "alpha": (_share_of_one, "a number in [0, 1]"),
    "alpha_ranges": (_alpha_range, "a tuple (least, greatest), 0 <= least <= greatest <= 1"),
    "weight_clip": (_weight_clip, "a number in (0, 1]"),
    "dynamic": (_share_of_one, "a share of the linears, in [0, 1]"),
    "in_float": (_share_of_one, "a share of the linears, in [0, 1]"),
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The settings among which an autotuning searches; each field is a tuple of choices.

    Raises `SqCpuError` for an empty tuple, and for a choice that no configuration can have.
    """

    activations: tuple[Activations, ...] = ("static", "per_token", "per_tensor")
    symmetric: tuple[bool, ...] = (True, False)
    static_range: tuple[str | float, ...] = ("auto",)
    """The others are searched only if given."""
    smoothing: tuple[str, ...] = ("tuned", "smoothquant", "aqas")
    alpha: tuple[float, ...] = tuple(step / 20 for step in range(4, 20))
    """Of "smoothquant"."""
    alpha_ranges: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """Of "tuned"."""
    weight_clip: tuple[float, ...] = (1.0, 0.95, 0.9)
    dynamic: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5)
    """Shares of the linears, by rank, that override other activations with per-token ones."""
    in_float: tuple[float, ...] = (0.0, 0.0625)
    """Shares of the linears in float, by rank."""

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if not isinstance(values, tuple) or not values:
                raise SqCpuError(
                    f"search space: {field.name} is {values!r}; it is a tuple of one choice or more"
                )
            can_be, needed = _CHOICES[field.name]
            for value in values:
                if not can_be(value):
                    raise SqCpuError(
                        f"search space: {field.name} has {value!r}; each choice is {needed}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as JSON types."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def may_override(self, settings: Mapping[str, Any] | None) -> bool:
        """Return whether `suggest` may ask for ranks where these settings are given, or none."""
        shares = {"dynamic": self.dynamic, "in_float": self.in_float}
        given = settings or {}
        return any(given.get(name, max(choices)) > 0 for name, choices in shares.items())

    def suggest(self, trial: Trial, ranked: Ranked) -> Configuration:
        """Return the configuration of the sampler's choice.

        `ranked` gives for "per_token" and "float" all linears, those that gain most of it first. It
        is asked only where some override the settings.
        """

        def choose(name: str, among: Sequence[Any]) -> Any:
            return among[0] if len(among) == 1 else trial.suggest_categorical(name, among)

        activations: Activations = choose("activations", self.activations)
        smoothing: str = choose("smoothing", self.smoothing)
        alpha: tuple[float, ...] = ()
        if smoothing == "tuned":
            index = choose("alpha_range", tuple(range(len(self.alpha_ranges))))
            alpha = self.alpha_ranges[index]
        elif smoothing == "smoothquant":
            # An integer, not a category: samplers then know that 3 is next to 4.
            alphas = sorted(self.alpha)
            last = len(alphas) - 1
            alpha = (alphas[trial.suggest_int("alpha", 0, last) if last else 0],)
        is_static = activations == "static"
        configuration = Configuration(
            activations=activations,
            symmetric=choose("symmetric", self.symmetric),
            static_range=choose("static_range", self.static_range) if is_static else "auto",
            smoothing=smoothing,
            alpha=alpha,
            weight_clip=choose("weight_clip", self.weight_clip),
        )
        if activations != "per_token":
            configuration = _share(
                configuration, choose("dynamic", self.dynamic), "per_token", ranked
            )
        return _share(configuration, choose("in_float", self.in_float), "float", ranked)

    def defaults(self) -> list[dict[str, Any]]:
        """Return the settings to try first: the plainest of each kind of activations."""
        plain: list[dict[str, Any]] = []
        for activations in self.activations:
            settings = {
                "activations": activations,
                "smoothing": self.smoothing[0],
                "symmetric": self.symmetric[0],
                "static_range": self.static_range[0],
                "weight_clip": self.weight_clip[0],
                "dynamic": self.dynamic[0],
                "in_float": self.in_float[0],
            }
            plain.append({name: value for name, value in settings.items() if self._asks(name)})
        return plain

    def _asks(self, name: str) -> bool:
        return len(getattr(self, name)) > 1


def _share(
    configuration: Configuration,
    share: float,
    precision: Precision,
    ranked: Ranked,
) -> Configuration:
    if not share:
        return configuration
    names = ranked(precision)
    # Rounded up: a share above 0 is at least one linear.
    return configuration.changed(names[: -int(-share * len(names) // 1)], precision)
