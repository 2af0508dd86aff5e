"""The linears of a block as parts of a program."""

from __future__ import annotations

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.observing import find, is_altered
from sq_cpu.inference.stages import Linear
from sq_cpu.models.linears import LINEAR_TYPES
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear

__all__ = ["Layer", "gate_and_up", "layer_at", "linear_of"]

Layer = QuantLinear | DecomposedLinear | nn.Linear
_Rows = tuple[int, int] | None


def layer_at(block: nn.Module, path: str) -> Layer:
    """Return the linear at a path, or raise `SqCpuError` for what a program cannot run."""
    layer: Layer = find(block, path)
    if is_altered(layer):
        raise SqCpuError(f"{path} has hooks, or a forward of its own")
    kind = type(layer)
    if as_linear := LINEAR_TYPES.get(f"{kind.__module__}.{kind.__qualname__}"):
        return as_linear(layer)
    if kind not in (QuantLinear, DecomposedLinear, nn.Linear):
        raise SqCpuError(f"{path} is a {kind.__name__}, which a program cannot run")
    return layer


def gate_and_up(block: nn.Module, paths: tuple[str, ...]) -> list[tuple[Layer, _Rows]]:
    """Return gate and up, each with its rows: of two linears, or of one that is both."""
    layers = [layer_at(block, path) for path in paths]
    if len(layers) == 2:
        return [(layer, None) for layer in layers]
    rows = layers[0].out_features
    return [(layers[0], (0, rows // 2)), (layers[0], (rows // 2, rows))]


def linear_of(
    layer: Layer,
    out: str,
    *,
    rows: _Rows = None,
    column: int = 0,
    activation: str | None = None,
    other: str | None = None,
    accumulate: bool = False,
    multiplier: float = 1.0,
) -> Linear:
    """Return a linear of a `Project`, or some of its rows."""
    begin, end = rows or (0, layer.out_features)
    columns = weight = None
    if isinstance(layer, DecomposedLinear):
        columns = layer.columns
        weight = layer.outlier_weight.detach().float()[begin:end].T.contiguous() * multiplier
        layer = layer.regular
    return Linear(
        layer,
        begin,
        end,
        out,
        column,
        activation,
        other,
        accumulate,
        columns,
        weight,
        multiplier,
    )
