"""Baselines: what a test once measured on a machine class, in a JSON file for each class."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sq_cpu import files
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import Machine
from sq_cpu.parsing import check_fields, read_json, record

__all__ = ["HOW_TO_WRITE", "Baseline", "Baselines"]

FORMAT_VERSION = 1
HOW_TO_WRITE = "write it with --sq-cpu-baseline-update"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one test measured."""

    work: str
    """What was measured, in words; a value of other work says nothing."""
    value: float
    """The accuracy; or seconds of the model over seconds of the reference."""
    seconds: float | None
    reference_seconds: float | None
    model: str
    config_sha256: str
    date: str
    """ISO 8601, UTC."""
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        check_fields(self, "a baseline")

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.date}, {versions}, {self.model} (config {self.config_sha256[:12]})"


@dataclass(frozen=True)
class _Content:
    """The fields of the file."""

    format_version: int
    machine: dict[str, Any]
    baselines: dict[str, Baseline]

    def __post_init__(self) -> None:
        check_fields(self, "it")


class Baselines:
    """The baselines of a machine class: a JSON file in a folder."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine = machine
        name = re.sub(r"[^a-z0-9_]+", "-", str(machine).lower()).strip("-")
        self.path = folder / f"{name}.json"

    def read(self) -> dict[str, Baseline]:
        """Return the baselines by the names of their tests; none where there is no file.

        Raises `SqCpuError` for a file that is damaged, newer, or another machine's.
        """
        if not self.path.exists():
            return {}
        try:
            content = record(_Content, read_json(self.path), "it")
            if (version := content.format_version) != FORMAT_VERSION:
                raise SqCpuError(f"format_version is {version}, not {FORMAT_VERSION}")
            if content.machine != asdict(self.machine):
                raise SqCpuError(f"it is of another machine class, {content.machine}")
        except SqCpuError as error:
            raise SqCpuError(
                f"{self.path} is no baseline of this machine class ({error}); restore it, or "
                f"delete it and {HOW_TO_WRITE}"
            ) from error
        return content.baselines

    def write(self, name: str, baseline: Baseline) -> None:
        """Add a test's baseline, or replace it."""
        content = {
            "format_version": FORMAT_VERSION,
            "machine": asdict(self.machine),
            "baselines": {
                n: asdict(b) for n, b in sorted((self.read() | {name: baseline}).items())
            },
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SqCpuError(f"cannot make {self.path.parent}: {error.strerror}") from error
        files.write_file(self.path, json.dumps(content, indent=1) + "\n")
