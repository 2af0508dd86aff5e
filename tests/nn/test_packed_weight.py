"""PackedWeight: what is packed is unpacked exactly, whatever its shape; nothing else packs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sq_cpu
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.nn.packed_weight import PackedWeight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (33, 200), (0, 5), (5, 0)], ids=str)
def test_what_is_packed_is_unpacked(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    scale, added = torch.rand(shape[0]), torch.randn(shape[0]) if bias else None
    packed = PackedWeight.zeros(*shape)
    packed.pack(weight, scale, added)
    assert torch.equal(packed.weight(), weight)
    assert torch.equal(packed.scale(), scale)
    assert torch.equal(packed.bias(), torch.zeros(shape[0]) if added is None else added)
    again = PackedWeight(packed.buffer.clone(), *shape)
    assert torch.equal(again.weight(), weight)
    assert packed.nbytes == packed.buffer.nbytes == _core.packed_bytes(*shape)


def test_any_layout_and_float_dtype_is_packed() -> None:
    weight = torch.randint(-128, 128, (40, 30), dtype=torch.int8)
    packed = PackedWeight.zeros(30, 40)
    packed.pack(weight.T, torch.ones(30, dtype=torch.bfloat16), torch.ones(60).double()[::2])
    assert torch.equal(packed.weight(), weight.T)
    assert torch.equal(packed.bias(), torch.ones(30))


def test_a_new_one_is_zeros() -> None:
    packed = PackedWeight.zeros(20, 70)
    assert not packed.weight().any()
    assert not packed.bias().any()


def test_what_cannot_be_packed_is_refused() -> None:
    packed = PackedWeight.zeros(2, 3)
    weight = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(SqCpuError, match="a weight scale is NaN or Inf"):
        packed.pack(weight, torch.tensor([1.0, torch.inf]), None)
    with pytest.raises(SqCpuError, match="packs on the CPU only"):
        packed.pack(weight.to("meta"), torch.ones(2), None)
    with pytest.raises(SqCpuError, match="the weight is on meta"):
        PackedWeight(packed.buffer.to("meta"), 2, 3).weight()


def test_nothing_else_packs() -> None:
    (folder,) = sq_cpu.__path__
    users = {
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*.py")
        if re.search(r"_core\.(un)?pack_weight", path.read_text(encoding="utf-8"))
    }
    assert users == {"nn/packed_weight.py"}
