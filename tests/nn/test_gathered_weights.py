"""Packed weights that lie side by side, in huge pages."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import sq_cpu
from sq_cpu.nn import packed_weight
from sq_cpu.nn.packed_weight import gather_weights


def layers_of(*shapes: tuple[int, int]) -> list[sq_cpu.QuantLinear]:
    torch.manual_seed(0)
    return [
        sq_cpu.QuantLinear.from_float(torch.nn.Linear(k, n), sq_cpu.Scheme.of("O1"))
        for n, k in shapes
    ]


def test_results_and_order_stay() -> None:
    layers = layers_of((1536, 576), (1000, 577), (1536, 2048), (30, 20))
    x = [torch.randn(3, layer.in_features) for layer in layers]
    wanted = [layer(each) for layer, each in zip(layers, x, strict=True)]
    gather_weights(layer.packed for layer in layers)
    ends = [(layer.packed.data_ptr(), layer.packed.nbytes) for layer in layers]
    assert ends[0][0] % (2 << 20) == 0
    for (begin, size), (after, _) in itertools.pairwise(ends):
        assert begin + size == after
    for layer, each, result in zip(layers, x, wanted, strict=True):
        assert torch.equal(layer(each), result)
        again = copy.deepcopy(layer)
        assert torch.equal(again(each), result)


def test_gathered_ones_stay_where_they_are() -> None:
    layers = layers_of((1536, 2048), (1536, 2048))
    for _ in range(2):
        gather_weights([layers[0].packed, layers[0].packed, layers[1].packed])
        places = [layer.packed.data_ptr() for layer in layers]
    gather_weights(layer.packed for layer in layers[::-1])
    assert [layer.packed.data_ptr() for layer in layers] == places


def test_few_and_large_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = layers_of((64, 64), (1536, 2048))
    places = small.packed.data_ptr(), large.packed.data_ptr()
    gather_weights([small.packed])
    monkeypatch.setattr(packed_weight, "_MOST_GATHERED", 1 << 20)
    gather_weights([large.packed])
    assert (small.packed.data_ptr(), large.packed.data_ptr()) == places


def test_groups_bound_what_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "_MOST_GATHERED", 5 << 20)
    layers = layers_of(*[(1536, 1024)] * 8)
    gather_weights(layer.packed for layer in layers)
    sizes = [layer.packed.untyped_storage().nbytes() for layer in layers]
    assert max(sizes) < 9 << 20
    assert len({layer.packed.untyped_storage().data_ptr() for layer in layers}) == 2
