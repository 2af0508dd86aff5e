"""What a layer makes of its smoothing: once, also where torch traces the layer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sq_cpu import QuantLinear, Scheme
from sq_cpu.kernels import ops


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def scales(k: int) -> Tensor:
    return torch.logspace(-2, 2, k)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme.of("O2"), Scheme.of("O3", symmetric=False)])
def test_the_traced_operator_makes_nothing_of_a_smoothing(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    reciprocals = ops.reciprocals
    monkeypatch.setattr(ops, "reciprocals", lambda s: made.append(s) or reciprocals(s))
    input_range = (-2.5, 3.0) if scheme.activations == "static" else None
    linear = nn.Linear(70, 20)
    layer = QuantLinear.from_float(linear, scheme, input_range, smoothing=scales(70))
    count = len(made)
    x = torch.randn(5, 70)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    program = torch.export.export(nn.Sequential(layer), (x,)).module()
    for run in (compiled, program):
        for _ in range(3):
            assert torch.equal(run(x), expected)
    assert len(made) == count
    twin = copy.deepcopy(layer)
    twin.load_state_dict(twin.state_dict() | {"smoothing": scales(70).flip(0)})
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), twin(x))
    assert not torch.equal(twin(x), expected)


def test_also_where_the_layer_is_made_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        layer = QuantLinear.from_float(nn.Linear(70, 20), Scheme(), smoothing=scales(70))
        other = QuantLinear(70, 20, Scheme(), bias=True, smoothed=True)
        other.load_state_dict(layer.state_dict())
    monkeypatch.setattr(ops, "reciprocals", lambda _: pytest.fail("made again"))
    x = torch.randn(5, 70)
    for each in (layer, other):
        compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
