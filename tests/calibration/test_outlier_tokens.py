"""Tokens with massive activations are found by their rows, and counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sq_cpu import SqCpuError, outlier_tokens


class Rows(nn.Module):
    """Two linears; the second sees what is massive."""

    def __init__(self, massive: dict[int, float]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        reach = torch.ones(32)
        for token, times in massive.items():
            reach[token] = times
        self.register_buffer("reach", reach)
        nn.init.ones_(self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        self.first(x)
        y: Tensor = self.second(x * self.reach[ids][..., None])
        return y


WINDOWS = [
    torch.tensor([[1, 9, 9, 9, 5, *range(10, 26)]]),
    torch.tensor([[1, 5, 7, 7, 8, *range(10, 26)]]),
]


@pytest.mark.parametrize(
    ("massive", "front", "most", "found"),
    [
        ({}, [], 2, []),
        ({1: 500.0}, [], 2, [1]),
        ({1: 500.0}, [1], 2, [1]),
        ({1: 500.0, 9: 65.0, 5: 80.0, 8: 90.0}, [1], 2, [1, 9, 5]),
        ({9: 65.0, 5: 80.0}, [1], 1, [1, 9]),
        ({9: 63.0, 5: 80.0}, [1], 2, [1, 5]),
        ({9: 65.0}, [1], 0, [1]),
    ],
)
def test_the_most_frequent(
    massive: dict[int, float], front: list[int], most: int, found: list[int]
) -> None:
    model = Rows(massive).train()
    assert outlier_tokens(model, WINDOWS, front, most=most) == found
    assert model.training


def test_windows_that_are_none() -> None:
    with pytest.raises(SqCpuError, match=r"a window is \[2, 21\]"):
        outlier_tokens(Rows({}), [torch.cat(WINDOWS)])
    with pytest.raises(SqCpuError, match=r"begins with \[2\]"):
        outlier_tokens(Rows({}), WINDOWS, [2])
    with pytest.raises(SqCpuError, match="most is -1"):
        outlier_tokens(Rows({}), WINDOWS, most=-1)
