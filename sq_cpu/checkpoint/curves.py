"""The losses that a search of alpha tried, in a file beside config.json: the report draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import json_text
from sq_cpu.parsing import read_json
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = ["CURVES", "with_stored_curves", "write_curves"]

CURVES = "search_curves.json"


def write_curves(folder: Path, record: QuantizationRecord) -> QuantizationRecord:
    """Write the curves of the record's plan, if it has any; return the record without them."""
    if record.plan is None or not any(group.curve for group in record.plan.groups):
        return record
    curves = {g.name: [list(point) for point in g.curve] for g in record.plan.groups if g.curve}
    (folder / CURVES).write_text(json_text(curves) + "\n", encoding="utf-8")
    groups = tuple(replace(group, curve=()) for group in record.plan.groups)
    return replace(record, plan=replace(record.plan, groups=groups))


def with_stored_curves(
    record: QuantizationRecord, folder: Path, settings: Mapping[str, Any]
) -> QuantizationRecord:
    """Return the record with the curves that a folder stores, if its settings name such a file.

    Raises `SqCpuError` for a file that is not one of curves.
    """
    path = folder / CURVES
    named = settings.get("companions")
    if record.plan is None or not isinstance(named, list | dict) or CURVES not in named:
        return record
    if not path.exists():  # the hub's client fetches what is read
        return record
    curves = read_json(path)
    try:
        return replace(record, plan=_with_curves(record.plan, curves))
    except (TypeError, ArithmeticError, SqCpuError) as error:
        raise SqCpuError(
            f"{path} does not hold the curves of a search ({first_line(error)}); remove it, or "
            "copy the checkpoint again"
        ) from error


def _with_curves(plan: SmoothPlan, curves: object) -> SmoothPlan:
    names = {group.name for group in plan.groups}
    if not isinstance(curves, dict) or not curves.keys() <= names:
        raise TypeError("not a table of the plan's groups")
    groups = (
        replace(group, curve=curves[group.name]) if group.name in curves else group
        for group in plan.groups
    )
    return replace(plan, groups=tuple(groups))
