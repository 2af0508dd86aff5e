"""What a linear costs on this machine: milliseconds by shape and precision.

They are measured once, with the layers that a model runs, and kept in a JSON file for each machine
class: processor, instruction set in use, threads, versions. A plan's latency is the sum over its
linears.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.files import write_file
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.kernels.runtime import Machine
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.parsing import check_fields, check_whole, read_json, record, typed
from sq_cpu.progress import track
from sq_cpu.scheme import Activations, Scheme

__all__ = ["PRECISIONS", "Costs", "Precision", "cache_file", "machine", "measured_costs"]

Precision = Literal["static", "per_token", "per_token_x2", "per_tensor", "float"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""How a linear can run: int8 with one of four kinds of activations, or float."""

_ROUNDS = 9
# Written between two calls, so that a linear's weights have left the caches, as in a model.
_FLUSHED_BYTES = 128 << 20

_Entries = dict[str, dict[str, float]]
_Table = dict[str, dict[str, _Entries]]
"""Of a cache: by dtype, tokens, shape and variant."""


@dataclass(frozen=True, eq=False)
class Costs:
    """Median milliseconds of one call of a linear, at a fixed number of rows."""

    tokens: int
    """Rows of the input, the same for every linear, experts included."""
    dtype: str
    """Of the input, and of a float linear: "float32", "bfloat16" or "float16"."""
    entries: Mapping[str, Mapping[str, float]]
    """Shape, as in "1536x576" (out_features, in_features) -> `Precision`, with "+smoothing" where
    the input is divided by s while it is quantized, and "+hadamard" where it is rotated then ->
    milliseconds."""

    def __post_init__(self) -> None:
        check_fields(self, "the cost table")

    def milliseconds(
        self,
        linear: nn.Module,
        precision: Precision,
        *,
        smoothed: bool = False,
        rotated: bool = False,
    ) -> float:
        """Return what one call costs; `SqCpuError` for a shape that was not measured."""
        variant = _variant(precision, smoothed, rotated)
        try:
            return self.entries[_shape(linear)][variant]
        except KeyError:
            raise SqCpuError(
                f"the cost table has no linear of {_shape(linear)}, {variant}: measure this model"
            ) from None

    def of(self, linears: Iterable[nn.Module]) -> float:
        """Return the milliseconds of linears as they are, int8 or float.

        The few channels that a `DecomposedLinear` keeps in float are not counted.
        """
        total = 0.0
        for linear in linears:
            if isinstance(linear, DecomposedLinear):
                linear = linear.regular
            if isinstance(linear, QuantLinear):
                total += self.milliseconds(
                    linear,
                    linear.scheme.activations,
                    smoothed=linear.smoothing is not None,
                    rotated=bool(linear.hadamard),
                )
            else:
                total += self.milliseconds(linear, "float")
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON types."""
        entries = {shape: dict(row) for shape, row in self.entries.items()}
        return {"tokens": self.tokens, "dtype": self.dtype, "entries": entries}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """Rebuild what `to_dict` gave; `SqCpuError` on anything else."""
        return record(cls, values, "the cost table")


def machine() -> dict[str, Any]:
    """Return what a cost table holds for: processor, instruction set, threads and versions."""
    versions = {"torch": torch.__version__, "sq_cpu": version("sq_cpu")}
    return asdict(Machine.here()) | versions


def cache_file() -> Path:
    """Return where this machine class keeps its table: in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return folder / "sq_cpu" / f"costs-{digest[:12]}.json"


def measured_costs(
    linears: Iterable[nn.Module],
    *,
    tokens: int = 512,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    progress: bool | None = None,
) -> Costs:
    """Return the costs of all shapes among `linears`, measuring those that are not cached.

    Parameters
    ----------
    linears : modules; only their out_features and in_features are read
    tokens : rows of the input: 512 for a prefill, 1 for decoding
    dtype : fp32, bf16 or fp16, of activations and float weights
    cache : the file; None: `cache_file()`. A file that is absent or damaged is written anew.

    Every call finds its weights outside the core's caches. The variants of a shape take turns, and
    the median of each counts. A shape takes about two seconds, and its weights sixteen times as
    int8.

    Raises
    ------
    SqCpuError
        For tokens < 1, another dtype, and a cache that cannot be written.
    """
    check_whole(1, tokens=tokens)
    if dtype not in FLOATS:
        raise SqCpuError(f"costs are measured in fp32, bf16 or fp16, not {dtype}")
    path = cache_file() if cache is None else cache
    kind = str(dtype).removeprefix("torch.")
    table = _read(path)
    stored = table.setdefault(kind, {}).get(str(tokens), {})
    known = {shape: row for shape, row in stored.items() if _is_whole(row)}
    shapes = {_shape(linear): linear for linear in linears}
    missing = [shape for shape in shapes if shape not in known]
    for shape in track(missing, "measuring linears", progress):
        known[shape] = _measure(shapes[shape], tokens, dtype)
    if missing:
        table[kind][str(tokens)] = known
        _write(path, table)
    return Costs(tokens, kind, {shape: known[shape] for shape in shapes})


def _shape(linear: Any) -> str:
    return f"{linear.out_features}x{linear.in_features}"


def _variant(precision: Precision, smoothed: bool, rotated: bool) -> str:
    return precision + "+smoothing" * smoothed + "+hadamard" * rotated


# Of rows from a normal distribution, divided by 0.5 where they are smoothed: none clips and none
# underflows, so that none gets its own scale.
_RANGE = 12.0

_INT8: tuple[tuple[Activations, bool, bool], ...] = tuple(
    product(get_args(Activations), (False, True), (False, True))
)
_VARIANTS = {"float", *(_variant(*each) for each in _INT8)}


def _variants(linear: nn.Linear) -> Iterator[tuple[str, nn.Module]]:
    yield "float", linear
    s = torch.full((linear.in_features,), 0.5)
    for activations, smoothed, rotated in _INT8:
        layer = QuantLinear.from_float(
            linear,
            Scheme(activations=activations),
            (-_RANGE, _RANGE),
            smoothing=s if smoothed else None,
            hadamard=BLOCK if rotated else 0,
        )
        yield _variant(activations, smoothed, rotated), layer


@torch.inference_mode()
def _measure(like: Any, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(like.in_features, like.out_features, bias=False)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / 16)
    layers = dict(_variants(linear.to(dtype)))
    x = torch.randn(tokens, like.in_features, generator=generator).to(dtype)
    flushed = torch.zeros(_FLUSHED_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for round_ in range(_ROUNDS + 1):
        for name, layer in layers.items():
            flushed.add_(1)
            x.abs()  # the layer before has just written it
            start = time.perf_counter()
            layer(x)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _read(path: Path) -> _Table:
    """Return what a cache holds; nothing of a file that is absent or damaged."""
    try:
        table: _Table = typed(_Table, read_json(path)["costs"], "costs")
    except (SqCpuError, LookupError, TypeError):
        return {}
    return table


def _is_whole(row: Mapping[str, float]) -> bool:
    return set(row) == _VARIANTS and all(value > 0 for value in row.values())


def _write(path: Path, table: _Table) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SqCpuError(
            f"cannot make the cache folder {path.parent} ({error.strerror}): set XDG_CACHE_HOME"
        ) from error
    content = {"costs": table, "machine": machine()}
    write_file(path, json.dumps(content, indent=1) + "\n")
