"""That a program computes what the model does, before it takes its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.observing import Seen, is_altered
from sq_cpu.inference.stages import Head
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.linear import QuantLinear

__all__ = ["head_seen", "in_float32", "in_floats", "no_weight", "prove"]

# Of what a block adds to the residual: both are fp32 sums, of up to some 10^4 terms.
_MOST_ERROR = 1e-4


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def prove(name: str, found: Tensor, wanted: Tensor) -> None:
    """Raise `SqCpuError` where stages have `found` something else than the model's `wanted`."""
    if found.shape != wanted.shape or not (error := _error(found, wanted)) <= _MOST_ERROR:
        off = "" if found.shape != wanted.shape else f" are {100 * error:.2g} % off"
        raise SqCpuError(
            f"{name} does something else than its row says: without int8 its stages{off}"
        )


def no_weight(layer: QuantLinear) -> Tensor:
    """Stand for the weights of stages that have none."""
    raise AssertionError(layer)


def head_seen(seen: Seen, layer: nn.Module | None, cap: float) -> Head | None:
    """Return what makes logits, where that is the head, a multiplier and `cap` (0: none) alone."""
    if layer is None or seen.head is None or seen.logits is None or seen.hidden is None:
        return None
    given, made = seen.head
    if made.shape != seen.logits.shape or not torch.equal(given, seen.hidden):
        return None
    if type(layer) not in (QuantLinear, nn.Linear) or is_altered(layer):
        return None
    uncapped = seen.logits.double()
    if cap:
        uncapped = cap * torch.atanh((uncapped / cap).clamp(-1 + 1e-12, 1 - 1e-12))
    multiplier = float((uncapped * made).sum() / made.double().square().sum())
    multiplier = 1.0 if abs(multiplier - 1) < _MOST_ERROR else multiplier
    logits = made * multiplier
    logits = cap * torch.tanh(logits / cap) if cap else logits
    alike = _error(logits, seen.logits) <= _MOST_ERROR
    return Head(layer, multiplier, cap) if alike else None  # type: ignore[arg-type]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in fp32 meanwhile; after it every tensor is what it was."""
    tensors = [
        (x, x.data)
        for x in (*model.parameters(), *model.buffers())
        if x.is_floating_point() and x.dtype != torch.float32
    ]
    kinds = (QuantLinear, QuantEmbedding)
    layers = [(m, m.dtype) for m in model.modules() if isinstance(m, kinds)]
    for x, data in tensors:
        x.data = data.float()
    for layer, _ in layers:
        layer.dtype = torch.float32
    try:
        yield
    finally:
        for x, data in tensors:
            x.data = data
        for layer, dtype in layers:
            layer.dtype = dtype


@contextmanager
def in_floats(block: nn.Module) -> Iterator[dict[QuantLinear, Tensor]]:
    """Make a block's linears float ones of the same weights meanwhile; yields those weights."""
    weights: dict[QuantLinear, Tensor] = {}
    replaced = []
    for parent in [*block.modules()]:
        for name, layer in [*parent.named_children()]:
            if not isinstance(layer, QuantLinear | DecomposedLinear):
                continue
            regular = layer.regular if isinstance(layer, DecomposedLinear) else layer
            weight = regular.weight_float()
            weights[regular] = weight
            if isinstance(layer, DecomposedLinear):
                weight = weight.index_copy(1, layer.columns, layer.outlier_weight.float())
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if regular.bias is not None:
                plain.bias = nn.Parameter(regular.bias, requires_grad=False)
            replaced.append((parent, name, layer))
            setattr(parent, name, plain)
    try:
        yield weights
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)
