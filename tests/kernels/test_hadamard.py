"""The Hadamard transform against a dense matrix in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sq_cpu.kernels.hadamard import fwht64, hadamard, whole_blocks


@pytest.fixture(autouse=True)
def _inference() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def dense(size: int) -> Tensor:
    """Sylvester's construction, by its definition."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 128, 200])
def test_it_is_the_dense_orthonormal_matrix(columns: int) -> None:
    x, w = torch.randn(7, columns).double(), torch.randn(5, columns).double()
    whole = torch.zeros(7, whole_blocks(columns), dtype=torch.float64)
    whole[:, :columns] = x
    blocks = whole.view(7, -1, 64) @ (dense(64) / 8)
    # 64 terms in fp64, each rounded to 2^-53.
    torch.testing.assert_close(fwht64(x), blocks.view(7, -1), rtol=0, atol=2**-45)
    torch.testing.assert_close(fwht64(x) @ fwht64(w).T, x @ w.T, rtol=0, atol=2**-43)
    torch.testing.assert_close(fwht64(fwht64(x))[:, :columns], x, rtol=0, atol=2**-45)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_powers_of_two_are_exact(size: int) -> None:
    x = torch.diag(torch.tensor([2.0**i for i in range(-60, 68)]))
    for half in x.split(size, dim=1):
        expected = half.double() @ dense(size)
        assert torch.equal(hadamard(half, size).double(), expected)
    assert torch.equal(fwht64(fwht64(x)), x)


def test_a_large_matrix_is_rotated_in_pieces_of_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(700, 1000).bfloat16()
    expected = torch.cat([fwht64(row[None]) for row in x])
    assert torch.equal(fwht64(x), expected)
    assert torch.equal(fwht64(x.view(7, 100, 1000)).view(700, -1), expected)
    assert torch.equal(fwht64(x.float().requires_grad_()), fwht64(x.float()))
