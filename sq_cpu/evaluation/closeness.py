"""How close an int8 model's outputs are to the float model's, where no perplexity exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_leaves

from sq_cpu.errors import SqCpuError
from sq_cpu.models.calls import called, evaluating
from sq_cpu.progress import track

__all__ = ["Closeness", "closeness", "main_outputs"]


@dataclass(frozen=True)
class Closeness:
    """Int8 outputs beside those in float, on samples that no calibration saw."""

    relative_error: float
    """Norm of the difference over the norm of the float outputs."""
    cosine: float
    """Mean over the rows: of tokens, frames or samples."""
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return this as JSON."""
        return asdict(self)


def main_outputs(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], progress: bool | None = None
) -> list[Tensor]:
    """Return a model's main output for each batch, fp32 [rows, features], without padding.

    Floats of the batches are cast to the model's dtype. The output is `logits` or
    `last_hidden_state`, or else the first floats that the model gives. `SqCpuError` where there are
    none, or its forward fails.
    """
    found = []
    dtype = getattr(model, "dtype", torch.float32)
    with evaluating(model):
        for batch in track(batches, "comparing", progress):
            given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
            output = called(model, ((), given), "a held-out batch")
            found.append(_rows(output, batch))
    return found


def _rows(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    named = (getattr(output, name, None) for name in ("logits", "last_hidden_state"))
    every = [*named, *tree_leaves(output)]
    floats = (x for x in every if isinstance(x, Tensor) and x.is_floating_point() and x.dim())
    main = next(floats, None)
    if main is None:
        raise SqCpuError("the model gives no floats to compare")
    for name in ("decoder_attention_mask", "attention_mask"):
        if name in batch and batch[name].shape == main.shape[:-1]:
            return main[batch[name].bool()].float()
    return main.float().reshape(-1, main.shape[-1])


def closeness(int8: Sequence[Tensor], floats: Sequence[Tensor]) -> Closeness:
    """Return how close outputs of `main_outputs` are to those of the float model.

    `SqCpuError` for outputs of other shapes, that are not finite, and floats that are all zero.
    """
    if not floats or [x.shape for x in int8] != [x.shape for x in floats]:
        raise SqCpuError("the two models give outputs of different shapes: nothing to compare")
    difference = norm = cosine = 0.0
    for a, b in zip(int8, floats, strict=True):
        a, b = a.double(), b.double()
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
        cosine += float(cosine_similarity(a, b, dim=-1).sum())
    rows = sum(map(len, floats))
    if not (math.isfinite(difference) and 0 < norm < math.inf):
        what = "all zero" if norm == 0 else "not finite"
        raise SqCpuError(f"the outputs of one of the models are {what}: check its weights")
    return Closeness(math.sqrt(difference / norm), cosine / rows, rows)
