"""The `quantization_config` of transformers: what was done to a model, or what is asked for."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint.config import QUANT_METHOD
from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan, scheme_of
from sq_cpu.smoothing.rules import DEFAULT_ALPHA

__all__ = ["SqCpuConfig"]

_ASKED = ("scheme", "alpha", "plan", "calibration", "ignore")


@register_quantization_config(QUANT_METHOD)
class SqCpuConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(float_model, quantization_config=SqCpuConfig(...))` is to do.

    The model is loaded in float, calibrated if need be, and quantized as :func:`sq_cpu.quantize`
    does. Of an int8 model (`model.config.quantization_config`, and in config.json) it has the
    fields of its record instead.

    Parameters
    ----------
    scheme : str or Scheme, optional
        "O1", "O2" or "O3"; default: the plan's, else "O1".
    alpha : float, optional
        Migration strength of every group, in [0, 1]; default 0.8. A plan has its own.
    plan : path-like or SmoothPlan, optional
        What to carry out, as `SmoothPlan.save` wrote it.
    calibration : path-like, Calibration, or iterable of batches, optional
        The file that `Calibration.save` wrote, or what :func:`sq_cpu.calibrate` takes. Without one,
        O1 and O2 quantize the weights unsmoothed, which a warning says, and O3 is refused.
    ignore : iterable of str, optional
        Linears to leave in float, as `Scheme.ignore`; default: the scheme's.

    Raises
    ------
    SqCpuError
        For an argument that is not one of these, and an `ignore` that lists none. The rest is
        checked when a model is loaded.
    """

    def __init__(self, **settings: Any) -> None:
        # A table from config.json, or of one's own, says what method it is of.
        if "quant_method" not in settings:
            _check_asked(settings)
            settings = dict.fromkeys(_ASKED) | settings
        for name in settings:
            if callable(getattr(type(self), name, None)):
                raise SqCpuError(f"quantization_config has {name!r}, which is no setting: drop it")
        self.__dict__.update(settings)
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: files by their paths, and of batches nothing."""
        values = {name: value for name, value in self.__dict__.items() if name != "calibration"}
        for name in ("scheme", "plan"):
            if isinstance(values.get(name), Scheme | SmoothPlan):
                values[name] = values[name].to_dict()
        if isinstance(values.get("plan"), os.PathLike):
            values["plan"] = os.fspath(values["plan"])
        if values.get("ignore") is not None:
            values["ignore"] = list(values["ignore"])
        if "calibration" in self.__dict__:
            is_path = isinstance(self.calibration, str | os.PathLike)
            values["calibration"] = os.fspath(self.calibration) if is_path else None
        return copy.deepcopy(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> SqCpuConfig:
        """Return a copy with the same calibration: batches may be large, or a generator."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            if name != "calibration":
                setattr(made, name, copy.deepcopy(value, memo))
        return made

    def quantize(self, model: nn.Module) -> nn.Module:
        """Quantize a float model in place as was asked, and return it.

        Raises `SqCpuError` as `sq_cpu.quantize` and `sq_cpu.calibrate` do.
        """
        settings = {name: value for name, value in vars(self).items() if name != "quant_method"}
        _check_asked(settings)
        scheme, alpha, plan, source, ignore = (settings.get(name) for name in _ASKED)
        if isinstance(plan, str | os.PathLike):
            plan = SmoothPlan.load(plan)
        elif isinstance(plan, dict):
            plan = SmoothPlan.from_dict(plan)
        if plan is not None and alpha is not None:
            raise SqCpuError("SqCpuConfig has an alpha and a plan, which has its own: drop one")
        scheme = Scheme.from_dict(scheme) if isinstance(scheme, dict) else scheme
        if ignore is not None:
            scheme = replace(scheme_of(scheme, plan), ignore=tuple(ignore))
        smooth = plan is not None or source is not None
        recipe = Recipe.of(
            scheme, plan, smooth=smooth, alpha=DEFAULT_ALPHA if alpha is None else alpha
        )
        if source is None and recipe.needs_calibration:
            raise SqCpuError(
                f"SqCpuConfig has no calibration, which {recipe.scheme.name} needs here: give "
                "calibration=, a file that Calibration.save wrote or batches of token ids"
            )
        if source is None and plan is None:
            warnings.warn(
                "SqCpuConfig has no calibration: the weights are quantized without smoothing, "
                "which costs accuracy",
                stacklevel=2,
            )
        return carry_out(model, _calibration(model, source, recipe.scheme), recipe)


def _check_asked(settings: Mapping[str, Any]) -> None:
    if unknown := sorted(set(settings) - set(_ASKED)):
        raise SqCpuError(f"SqCpuConfig has no {unknown[0]}: it takes {', '.join(_ASKED)}")
    ignore = settings.get("ignore", ())
    if isinstance(ignore, str) or not isinstance(ignore, Collection | None):
        raise SqCpuError(f"ignore is {ignore!r}, not a tuple of names, as in ('lm_head',)")


def _calibration(model: nn.Module, source: Any, scheme: Scheme) -> Calibration | None:
    if source is None or isinstance(source, Calibration):
        return source
    if isinstance(source, str | os.PathLike):
        return Calibration.load(source)
    if not isinstance(source, Iterable):
        raise SqCpuError(
            f"calibration is a {type(source).__name__}: give a file that Calibration.save wrote, "
            "or batches of token ids"
        )
    return calibrate(model, source, ignore=scheme.ignore)
