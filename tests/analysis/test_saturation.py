"""The count of pair sums that leave int16: exact on every instruction set, and what it says."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import batches, mixed_plan, tiny_model
from torch import Tensor, nn

import sq_cpu
from sq_cpu import QuantLinear, SaturationCount, Scheme, SqCpuError, texts
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.numerics.rounding import quantize_rows


def plain_count(layer: QuantLinear, x: Tensor) -> SaturationCount:
    static = None if layer.input_scale is None else (layer.input_scale, layer.input_zero_point)
    codes, _, _ = quantize_rows(x.reshape(-1, layer.in_features).float(), layer.scheme, static)
    products = codes.long()[:, None, :] * layer.weight_int8().long()
    sums = nn.functional.pad(products, (0, layer.in_features % 2)).unflatten(-1, (-1, 2)).sum(-1)
    return SaturationCount(sums.numel(), int(((sums < -32768) | (sums > 32767)).sum()))


class Chain(nn.Module):
    """Two int8 linears, the second with more rows than the first, and one that nothing reaches."""

    def __init__(self, features: int, scheme: Scheme) -> None:
        super().__init__()
        torch.manual_seed(0)

        def layer(inputs: int, outputs: int) -> QuantLinear:
            return QuantLinear.from_float(nn.Linear(inputs, outputs), scheme, (-1.0, 1.0))

        self.first, self.second, self.spare = layer(features, 37), layer(37, 20), layer(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.cat([y, -y]))  # type: ignore[no-any-return]


def test_layers_of_a_mixed_model_count_as_each_quantizes() -> None:
    model = tiny_model("llama")
    calibration = sq_cpu.calibrate(model, batches())
    sq_cpu.quantize(model, calibration, mixed_plan(model, calibration, Scheme.of("O3")))
    seen: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    found = sq_cpu.count_saturation(model, batches(1)).layers
    assert found == {name: plain_count(layer, *seen[name]) for name, layer in layers.items()}
    assert len({layer.scheme.activations for layer in layers.values()}) == 3


def test_inputs_quantized_once_count_for_each_layer_they_feed() -> None:
    scheme = Scheme(symmetric=False)
    layers = nn.ModuleList(QuantLinear.from_float(nn.Linear(64, 32), scheme) for _ in range(2))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> list[Tensor]:
            codes = self.layers[0].quantize_input(x)  # type: ignore[operator]
            return [layer(codes) for layer in self.layers]

    x = torch.rand(3, 64) ** 0.1
    found = sq_cpu.count_saturation(Shared(), [x])
    for i, layer in enumerate(layers):
        assert isinstance(layer, QuantLinear)
        assert found.layers[f"layers.{i}"] == plain_count(layer, x)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("features", [2, 67])
@pytest.mark.parametrize("activations", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_counts_are_exact(features: int, activations: Any, symmetric: bool) -> None:
    model = Chain(features, Scheme(activations=activations, symmetric=symmetric))
    batches = [torch.rand(3, 5, features) ** 0.2, torch.rand(1, features)]  # near their maximum
    seen: dict[str, list[SaturationCount]] = {"first": [], "second": []}
    with torch.no_grad():
        for x in batches:
            y = model.first(x)
            seen["first"].append(plain_count(model.first, x))
            seen["second"].append(plain_count(model.second, torch.cat([y, -y])))

    found = sq_cpu.count_saturation(model, batches)
    for name, counts in seen.items():
        pairs, saturated = sum(c.pairs for c in counts), sum(c.saturated for c in counts)
        assert found.layers[name] == SaturationCount(pairs, saturated)
    assert found.layers["first"].saturated > 0
    assert found.layers["spare"] == SaturationCount(0, 0)
    assert found.layers["spare"].share == 0
    assert found.total.pairs == sum(c.pairs for c in found.layers.values())
    assert found.total.share == found.total.saturated / found.total.pairs


@pytest.mark.parametrize("symmetric", [True, False])
def test_reduce_range_never_saturates(symmetric: bool) -> None:
    model = Chain(67, Scheme(symmetric=symmetric, reduce_range=True))
    found = sq_cpu.count_saturation(model, [torch.ones(3, 67), torch.rand(3, 67)])
    assert found.total.pairs > 0
    assert found.total.saturated == 0


def test_no_input_no_rows_and_half_precision() -> None:
    model = Chain(6, Scheme())
    x = torch.rand(3, 6)
    assert model.first.count_saturation(x[:0]) == (0, 0)
    assert model.first.count_saturation(x.bfloat16().T.contiguous().T)[0] == 3 * 37 * 3
    assert model.first.count_saturation(x[0])[0] == 37 * 3
    with pytest.raises(SqCpuError, match=r"input is torch\.int64"):
        model.first.count_saturation(x.long())


def test_the_model_is_left_as_it_was() -> None:
    model = Chain(6, Scheme())
    model.train()
    sq_cpu.count_saturation(model, [torch.rand(3, 6)])
    assert model.training
    assert not model.first._forward_pre_hooks
    with pytest.raises(SqCpuError, match="input is"):
        sq_cpu.count_saturation(model, [torch.rand(3, 7)])
    assert not model.first._forward_pre_hooks


def test_result_as_json() -> None:
    found = sq_cpu.count_saturation(Chain(2, Scheme()), [torch.ones(1, 2)])
    read = json.loads(json.dumps(found.to_dict()))
    assert list(read["layers"]) == ["first", "second", "spare"]
    first = found.layers["first"]
    assert read["layers"]["first"] == {
        "pairs": 37,
        "saturated": first.saturated,
        "share": first.saturated / 37,
    }
    assert read["total"]["pairs"] == found.total.pairs


def test_refusals() -> None:
    with pytest.raises(SqCpuError, match="no int8 linear in the model: quantize it first"):
        sq_cpu.count_saturation(nn.Linear(2, 2), [torch.ones(1, 2)])
    model = Chain(2, Scheme())
    with pytest.raises(SqCpuError, match="saturation got no batches"):
        sq_cpu.count_saturation(model, [])
    with pytest.raises(SqCpuError, match=r"saturation batch 1 is empty"):
        sq_cpu.count_saturation(model, [torch.ones(1, 2), torch.ones(0, 2)])


@pytest.mark.slow
def test_a_real_model(smollm2: Callable[[], tuple[nn.Module, Any]]) -> None:
    base, tokenizer = smollm2()
    windows = token_windows(tokenizer, texts.calibration(), window=256, windows=2)
    ids = token_windows(tokenizer, texts.evaluation(), window=128, windows=1)
    calibration = sq_cpu.calibrate(base, windows)
    saturated = {}
    for symmetric in (True, False):
        for reduce_range in (False, True):
            model = copy.deepcopy(base)
            scheme = Scheme.of("O3", symmetric=symmetric, reduce_range=reduce_range)
            sq_cpu.quantize(model, calibration, scheme=scheme, smooth=False)
            found = sq_cpu.count_saturation(model, ids)
            assert len(found.layers) == 210
            # 106 million weights: half as many pairs for each token.
            assert found.total.pairs == 128 * sum(
                layer.in_features // 2 * layer.out_features
                for layer in model.modules()
                if isinstance(layer, QuantLinear)
            )
            saturated[symmetric, reduce_range] = found.total.saturated
    assert saturated[True, True] == saturated[False, True] == 0
    assert saturated[True, False] > 0
    assert saturated[False, False] > 0
