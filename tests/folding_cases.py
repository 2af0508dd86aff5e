"""Random folds of a tiny model, and one that it hides from."""

from __future__ import annotations

from typing import Any

import torch
from tiny import batches
from torch import Tensor, nn

from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.smoothing.proof import prove_folds, refused_folds

TYPES = ["llama", "mistral", "qwen2", "opt"]

Scales = dict[SmoothingGroup, Tensor]


def random_scales(model: Any, *, spread: float = 2.0) -> Scales:
    generator = torch.Generator().manual_seed(2)
    return {
        group: torch.exp(spread * torch.randn(group.layout.channels, generator=generator))
        for group in smoothing_groups(model)
        if group.producer is not None
    }


def refused(model: Any, scales: Scales) -> dict[str, str]:
    """Give what the proof refuses, by group name, and why."""
    (ids,) = batches(1)
    with evaluating(model):
        found = refused_folds(
            model, scales, prove_folds(model, scales, lambda: [model(ids).logits])
        )
    return {group.name: reason for group, reason in found.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class LeakyNorm(nn.Module):
    """An MLP that hands its input on, as a post-norm or parallel block does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(mlp.__dict__)
        self.inner = type(mlp).forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self, x)
        return out + 0.01 * x
