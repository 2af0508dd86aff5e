"""Packed weights that lie side by side, in huge pages."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch

import sq_cpu
from sq_cpu.nn import gathering
from sq_cpu.nn.gathering import gather_weights


def layers_of(*shapes: tuple[int, int]) -> list[sq_cpu.QuantLinear]:
    torch.manual_seed(0)
    return [
        sq_cpu.QuantLinear.from_float(torch.nn.Linear(k, n), sq_cpu.Scheme.of("O1"))
        for n, k in shapes
    ]


def places_of(layers: list[sq_cpu.QuantLinear]) -> list[int]:
    return [layer.packed.data_ptr() for layer in layers]


def test_results_and_order_stay() -> None:
    layers = layers_of((1536, 576), (1000, 577), (1536, 2048), (30, 20))
    x = [torch.randn(3, layer.in_features) for layer in layers]
    wanted = [layer(each) for layer, each in zip(layers, x, strict=True)]
    gather_weights(layers)
    ends = [(layer.packed.data_ptr(), layer.packed.nbytes) for layer in layers]
    assert ends[0][0] % (2 << 20) == 0
    for (begin, size), (after, _) in itertools.pairwise(ends):
        assert begin + size == after
    for layer, each, result in zip(layers, x, wanted, strict=True):
        assert torch.equal(layer(each), result)
        assert torch.equal(copy.deepcopy(layer)(each), result)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(each), result)
        assert layer.packed.untyped_storage().nbytes() == layer.packed.nbytes


def test_gathered_ones_stay_where_they_are() -> None:
    layers = layers_of((1536, 2048), (1536, 2048))
    gather_weights([layers[0], layers[0], layers[1]])
    places = places_of(layers)
    gather_weights(layers)
    gather_weights(layers[::-1])
    assert places_of(layers) == places


def test_few_large_and_shared_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, shared = layers = layers_of((64, 64), (1536, 2048), (3072, 2048))
    shared.packed.share_memory_()
    places = places_of(layers)
    gather_weights([small, shared])
    monkeypatch.setattr(gathering, "_GROUP", 1 << 20)
    gather_weights([large])
    assert places_of(layers) == places
    assert shared.packed.is_shared()


def test_groups_bound_what_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_GROUP", 5 << 20)
    layers = layers_of(*[(1536, 1024)] * 6)
    gather_weights(layers)
    ends = [(layer.packed.data_ptr(), layer.packed.nbytes) for layer in layers]
    beside = [begin + size == after for (begin, size), (after, _) in itertools.pairwise(ends)]
    assert [*beside[:2], *beside[3:]] == [True] * 4  # of 1.6 MB: three in a group
    assert [place % (2 << 20) == 0 for place in places_of(layers)] == [True, False, False] * 2


def test_weights_of_inference_mode_move() -> None:
    with torch.inference_mode():
        layers = layers_of((1536, 2048), (1536, 2048))
        x = torch.randn(2, 2048)
        wanted = layers[1](x)
    gather_weights(layers)
    assert torch.equal(layers[1](x), wanted)
    with torch.inference_mode():
        layers = layers_of((1536, 2048), (1536, 2048))
        gather_weights(layers)
        assert torch.equal(layers[1](x), wanted)


def test_calls_on_another_thread_go_on() -> None:
    layers = layers_of((2048, 2048), (2048, 2048))
    x = torch.randn(4, 2048)
    wanted, wrong, done = layers[0](x), [], threading.Event()

    def call() -> None:
        while not done.is_set():
            if not torch.equal(layers[0](x), wanted):
                wrong.append(1)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for _ in range(8):
            gather_weights(layers)
            gathering._gathered.clear()
    finally:
        done.set()
        thread.join()
    assert not wrong
