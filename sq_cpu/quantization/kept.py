"""Which linears of those not ignored stay in float, and why: decided here, for every verb."""

from __future__ import annotations

from collections.abc import Iterable

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.numerics.rounding import FLOOR
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = ["kept_linears"]

_UNREACHED = "no calibration batch reached it"
_NOTHING = "its input was 0 in every calibration batch, which gives no static range"


def kept_linears(
    names: Iterable[str],
    calibration: Calibration | None,
    scheme: Scheme,
    plan: SmoothPlan | None,
) -> dict[str, str]:
    """Return the linears, among these, that stay in float, and why.

    A plan may say so, and a calibration: of those whose weight the model's own code uses, and of
    those that no batch reached, where `scheme.unreached` says so or there is no static range, and
    of those that have none for an input of zeros.
    """
    plan = plan or SmoothPlan(())
    kept = {}
    for name in names:
        if name in plan.in_float:
            kept[name] = plan.in_float[name]
        elif calibration is not None and name in calibration.in_float:
            kept[name] = calibration.in_float[name]
        elif calibration is not None:
            static = plan.layer_scheme(scheme, name).activations == "static"
            if name in calibration.unreached and (static or scheme.unreached == "float"):
                kept[name] = _UNREACHED
            elif static and name in calibration.channel_min and _is_zero(calibration, name):
                kept[name] = _NOTHING
    return kept


def _is_zero(calibration: Calibration, name: str) -> bool:
    return float(calibration.absmax(name).max()) < FLOOR
