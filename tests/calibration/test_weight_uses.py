"""Which linears' weights a model's own code uses: found while calibrating, kept in float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from other_models import ids, images, other_model
from tiny import batches, tiny_model
from torch import Tensor, nn

from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.calibration.weight_uses import CHANGED
from sq_cpu.errors import SqCpuError
from sq_cpu.models.families import register_family
from sq_cpu.models.family import Family, Group, Stack
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.tuning.tune import tune

Use = Callable[[nn.Linear, Tensor], Any]


class Looking(nn.Module):
    """Calls two linears, and does something of its own with the first one."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        used = self.use(self.first, x)
        y: Tensor = self.second(self.first(x))
        return y + used if isinstance(used, Tensor) and used.shape == y.shape else y


def _replace(linear: nn.Linear, _: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() / 2)


def _set(linear: nn.Linear, _: Tensor) -> None:
    linear.weight[0] = 0.0


def _set_data(linear: nn.Linear, _: Tensor) -> None:
    linear.weight.data = linear.weight.data / 2


_READS: dict[str, Use] = {
    "matmul": lambda linear, x: x @ linear.weight.T,
    "linear": lambda linear, x: nn.functional.linear(x, linear.weight),
    "forward": lambda linear, x: linear.forward(x),
    "by_keyword": lambda linear, x: nn.functional.linear(x, weight=linear.weight),
    "in_a_list": lambda linear, _: torch.cat([linear.weight, linear.weight]),
    "data": lambda linear, _: linear.weight.data,
    "detach": lambda linear, _: linear.weight.detach(),
    "cast": lambda linear, _: linear.weight.to(torch.float64),
    "numpy": lambda linear, _: linear.weight.numpy(),
    "norm": lambda linear, _: linear.weight.norm(),
    "bias": lambda linear, x: x + linear.bias,
}
_WRITES: dict[str, Use] = {
    "in_place": lambda linear, _: linear.weight.div_(2.0),
    "of_data": lambda linear, _: linear.weight.data.mul_(0.5),
    "out": lambda linear, _: torch.mul(linear.weight, 0.5, out=linear.weight),
    "item": _set,
    "set_data": _set_data,
    "replaced": _replace,
}
_HARMLESS: dict[str, Use] = {
    "nothing": lambda *_: None,
    "dtype": lambda linear, x: x.to(linear.weight.dtype),
    "like": lambda linear, x: x.to(linear.weight).type_as(linear.weight),
    "shape": lambda linear, x: x.reshape(-1, linear.weight.shape[1])[:, : linear.weight.size(0)],
    "others": lambda linear, x: x.to(linear.weight.device) * linear.weight.is_floating_point(),
    "call": lambda linear, x: linear(x),
}


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda weight: weight[:4],
    "transposed": lambda weight: weight.t(),
    "data": lambda weight: weight.data,
    "detached": lambda weight: weight.detach().reshape(-1)[3:],
}


@pytest.mark.parametrize("name", _VIEWS)
def test_a_view_that_the_model_was_built_with_counts_as_its_weight(name: str) -> None:
    model = Looking(lambda linear, x: x + vars(linear)["view"].sum())
    model.first.view = _VIEWS[name](model.first.weight)
    found = calibrate(model, [torch.randn(8, 6)])
    assert found.in_float == {"first": "the model's own code uses its weight (sum)"}


def test_other_parts_of_a_storage_are_other_tensors() -> None:
    storage = torch.randn(100)
    within, beside = storage[30:36], storage[72:78]
    model = Looking(lambda _, x: x + beside)
    model.first.weight = nn.Parameter(storage[:36].view(6, 6))
    model.second.weight = nn.Parameter(storage[36:72].view(6, 6).T)
    assert calibrate(model, [torch.randn(8, 6)]).in_float == {}
    model.use = lambda _, x: x + within
    assert calibrate(model, [torch.randn(8, 6)]).in_float.keys() == {"first"}


def test_all_linears_of_a_tied_weight_are_named() -> None:
    model = Looking(_READS["norm"])
    model.second.weight = model.first.weight
    assert calibrate(model, [torch.randn(8, 6)]).in_float.keys() == {"first", "second"}


@pytest.mark.parametrize("gradient_rows", [0, 4])
@pytest.mark.parametrize("name", [*_READS, *_WRITES, *_HARMLESS])
def test_a_weight_that_the_models_code_uses_stays_in_float(name: str, gradient_rows: int) -> None:
    torch.manual_seed(0)
    model = Looking((_READS | _WRITES | _HARMLESS)[name]).eval()
    found = calibrate(model, [torch.randn(8, 6)] * 2, gradient_rows=gradient_rows)
    assert "second" in found.channel_min
    if name in _HARMLESS:
        assert found.in_float == {}
        assert "first" in found.channel_min
    elif name in _WRITES:
        assert found.in_float == {"first": CHANGED}
    else:
        assert found.in_float["first"].startswith("the model's own code uses its weight (")
    assert not found.unreached
    for scheme in ("O1", "O2", "O3"):
        quantized = quantize(copy.deepcopy(model), found, scheme=scheme)
        record: Any = quantized.sq_cpu_config
        assert record.kept == found.in_float
        assert set(record.layers) == {"first", "second"} - record.kept.keys()
        with torch.no_grad():
            assert quantized(torch.randn(3, 6)).isfinite().all()


def test_an_int8_weight_says_how_it_could_have_been_found() -> None:
    model = quantize(Looking(_READS["matmul"]), scheme="O1", smooth=False)
    with pytest.raises(SqCpuError, match="quantize with a calibration, which finds what the model"):
        model(torch.ones(1, 6))


def test_owners_of_a_tied_weight_use_their_own() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    found = calibrate(model, batches(), ignore=())
    assert found.in_float == {}
    assert "lm_head" in found.channel_min


def test_what_was_found_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Looking(_READS["matmul"])
    found = calibrate(model, [torch.randn(8, 6)])
    loaded = Calibration.load(found.save(tmp_path / "calibration"))
    assert loaded.in_float == found.in_float != {}
    with pytest.raises(SqCpuError, match="first has to stay in float: the model's own code uses"):
        loaded.channels("first")


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("mamba", {"dt_proj"}),
        ("jamba", {"dt_proj"}),
        ("rwkv", {"attention.output", "feed_forward.value"}),
        ("deberta", set()),
        ("deepseek_v32", set()),
        ("blip-2", set()),
    ],
)
def test_models_of_transformers_run_as_before(name: str, kept: set[str], scheme: str) -> None:
    model = other_model(name)
    inputs: list[dict[str, Tensor]] = [{"input_ids": each} for each in ids()]
    if name == "blip-2":
        inputs = [i | {"pixel_values": each} for i, each in zip(inputs, images(), strict=True)]
    found = calibrate(model, inputs)
    quantized = quantize(copy.deepcopy(model), found, scheme=scheme)
    record: Any = quantized.sq_cpu_config
    own = {name for name, why in record.kept.items() if "own code" in why}
    assert {part for part in kept if any(name.endswith(part) for name in own)} == kept
    assert all(name.endswith(tuple(kept)) for name in own)
    with torch.no_grad():
        # As it comes: casting the input to the dtype of the codes would make integers of it.
        before, after = model(**inputs[0])[0], quantized(**inputs[0])[0]
    assert after.dtype == before.dtype
    assert (after - before).norm() < 0.06 * before.norm()  # of four numbers: chance has a part


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("scheme", [None, "O1", "O3"])
def test_torchs_own_layers_call_their_int8_linears(kind: Any, scheme: str | None) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(kind(8, 2, 16, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) if kind is nn.TransformerEncoderLayer else layer(x, x)
            return x

    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        if scheme is None:  # without a calibration
            quantize(model, scheme=Scheme(), smooth=False)
        else:
            quantize(model, calibrate(model, [x]), scheme=scheme)
        after = model(x)
    record: Any = model.sq_cpu_config
    assert record.layers == tuple(f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2))
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_nothing_is_folded_into_a_weight_that_the_models_code_uses() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            # What hooks cannot see: this size changes with what is folded into the weight.
            return (x + self.first(y) + self.second(y)) / self.second.weight.norm()

    class LookingBlocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)  # type: ignore[no-any-return]

    group = Group(producer="norm", consumers=("first", "second"))
    stack = Stack(blocks="layers", groups=(group,))
    register_family(Family(model_types=("LookingBlocks",), stacks=(stack,)))
    torch.manual_seed(0)
    model, x = LookingBlocks().eval(), torch.randn(16, 8)
    with torch.no_grad():
        model.layers[0].norm.weight[0] = 20.0
        before = model(x)
    found = calibrate(model, [x])
    assert found.in_float.keys() == {"layers.0.second"}
    record: Any = quantize(model, found, scheme="O1").sq_cpu_config
    (planned,) = record.plan.groups
    assert not planned.fold
    assert planned.note.startswith("layers.0.second: the model's own code uses its weight (norm)")
    with torch.no_grad():
        assert (model(x) - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_linears_that_share_a_weight_are_quantized_each(scheme: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(self.norm(x)).relu())
            return self.last(y.relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(16, 8)
    found = calibrate(model, [x])
    assert found.in_float == {}
    with torch.no_grad():
        before = model(x)
        for plan in (None, tune(model, found, scheme=scheme)):
            quantized: Any = quantize(copy.deepcopy(model), found, plan, scheme=scheme)
            assert quantized.sq_cpu_config.layers == ("last", "first", "second")
            assert (quantized(x) - before).norm() < 0.03 * before.norm()
