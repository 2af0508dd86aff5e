"""Baselines: what a test once measured on a machine class, in a JSON file for each class."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sq_cpu import files
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.kernels.runtime import Machine

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

    @classmethod
    def from_dict(cls, content: Any) -> Baseline:
        """Return what `dataclasses.asdict` wrote; raise `ValueError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise ValueError(f"an entry has not the fields {', '.join(sorted(names))}")
        for name in ("work", "model", "config_sha256", "date"):
            if not isinstance(content[name], str):
                raise ValueError(f"{name} is not a text")
        times = [content["seconds"], content["reference_seconds"]]
        for number in (content["value"], *(seconds for seconds in times if seconds is not None)):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise ValueError(f"{number!r} is not a finite number")
        if not isinstance(content["versions"], dict):
            raise ValueError("versions is not a table")
        return cls(**content)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.date}, {versions}, {self.model} (config {self.config_sha256[:12]})"


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
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format_version is {content['format_version']!r}, not {FORMAT_VERSION}"
                )
            if content["machine"] != asdict(self.machine):
                raise ValueError(f"it is of another machine class, {content['machine']}")
            return {name: Baseline.from_dict(b) for name, b in content["baselines"].items()}
        except FileNotFoundError:
            return {}
        except KeyError as error:
            reason = f"{error} is missing"
        # TypeError, AttributeError: JSON of another shape; RecursionError: brackets without end.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = first_line(error)
        raise SqCpuError(
            f"{self.path} is no baseline of this machine class ({reason}); restore it, or delete "
            f"it and {HOW_TO_WRITE}"
        )

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
