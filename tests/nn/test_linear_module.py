"""QuantLinear's ordinary life as an nn.Module: state dicts, copies, other processes, tracing."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quant_linears import SCHEMES, describe, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels.torch_ops import linear_settings
from sq_cpu.nn.decomposed import DecomposedLinear


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_state_dict_round_trip(scheme: Scheme) -> None:
    layer = make(70, 20, scheme)
    state = layer.state_dict()
    codes, scale = layer.weight_int8(), layer.weight_scale
    assert state["weight"].dtype == torch.int8
    assert torch.equal(state["weight"], codes)
    assert torch.equal(state["weight_scale"], scale)
    assert ("input_scale" in state) == (scheme.activations == "static")
    other = QuantLinear(70, 20, scheme, bias=True)
    other.load_state_dict(state)
    assert torch.equal(other.packed, layer.packed)
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer(x))


def test_load_state_dict_names_what_is_wrong() -> None:
    state = make(70, 20, Scheme()).state_dict()
    with pytest.raises(RuntimeError, match=r"weight is torch.int8 \(20, 70\), the layer needs"):
        QuantLinear(71, 20, Scheme(), bias=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        QuantLinear(70, 20, Scheme(), bias=False).load_state_dict(state)
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_scale"'):
        QuantLinear(70, 20, Scheme(), bias=True).load_state_dict(state)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme.of("O3", symmetric=False)], ids=describe)
def test_copies_and_casts_keep_every_bit(scheme: Scheme) -> None:
    layer = make(70, 20, scheme)
    x = torch.randn(3, 70)
    y = layer(x)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).half().float(),
        copy.deepcopy(layer).share_memory(),
    ):
        assert torch.equal(twin(x), y)
        assert twin.packed.data_ptr() != layer.packed.data_ptr()


def _child(layer: QuantLinear, x: torch.Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put((layer.packed.is_shared(), layer(x).tolist()))


def test_other_processes_read_the_shared_weight() -> None:
    layer = make(70, 20, Scheme()).share_memory()
    x = torch.randn(3, 70)
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    child = context.Process(target=_child, args=(layer, x, queue))
    child.start()
    shared, y = queue.get(timeout=120)
    child.join()
    assert shared
    assert y == layer(x).tolist()


def test_what_traces_or_transforms_sees_the_op() -> None:
    layer = make(64, 32, Scheme.of("O3"))
    x = torch.randn(5, 64)
    y = layer(x)
    traced: Any = make_fx(layer)(x)
    assert torch.equal(traced(x), y)
    assert torch.equal(torch.vmap(layer)(x[:, None]), y[:, None])
    assert torch.equal(layer(torch._neg_view(-x)), y)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == y.shape


def test_the_op_refuses_what_is_not_a_packed_weight() -> None:
    layer = make(64, 32, Scheme())
    rest: Any = (None, *linear_settings(), 0, None, None)
    for x, n in ((torch.randn(5, 128), 32), (torch.randn(5, 64), 50_000_000)):
        with pytest.raises(RuntimeError, match="are not a packed weight"):
            torch.ops.sq_cpu.linear(x, layer.packed, n, *rest)
        with pytest.raises(SqCpuError, match="are not a packed weight"):
            torch.ops.sq_cpu.linear(x.to("meta"), layer.packed.to("meta"), n, *rest)
    with pytest.raises(RuntimeError, match="use float32"):
        torch.ops.sq_cpu.linear(torch.randn(5, 64).double(), layer.packed, 32, *rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    layer = make(64, 4096, Scheme.of("O3"))
    x = torch.randn(2, 64)
    y, before = layer(x), layer.state_dict()
    torch.set_default_dtype(dtype)
    try:
        after = layer.state_dict()
        other = QuantLinear(64, 4096, layer.scheme, bias=True)
        other.load_state_dict(after)
        assert torch.equal(other(x), y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.dtype == after[name].dtype for name, value in before.items())


def test_other_devices_are_refused_or_ignored() -> None:
    linear = nn.Linear(8, 4)
    with torch.device("meta"):
        layer = QuantLinear.from_float(linear, Scheme())
    assert layer.packed.is_cpu
    gone = copy.deepcopy(layer).to("meta")
    with pytest.raises(SqCpuError, match="runs on the CPU only"):
        gone.state_dict()
    with pytest.raises(SqCpuError, match="packs on the CPU only"):
        gone.load_state_dict(layer.state_dict())


def test_a_refused_state_dict_leaves_the_layer_as_it_was() -> None:
    layer = make(8, 4, Scheme.of("O3"))
    packed, scale = layer.packed.clone(), layer.input_scale
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        state = layer.state_dict() | {"input_scale": torch.tensor(bad)}
        with pytest.raises(SqCpuError, match="static input scale"):
            layer.load_state_dict(state)
    assert torch.equal(layer.packed, packed)
    assert layer.input_scale == scale


def test_torch_compile_and_export_see_the_op() -> None:
    layer = make(64, 32, Scheme.of("O3"))
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert "sq_cpu.linear" in str(program.graph)
    assert torch.equal(program.module()(x), layer(x))
    arguments = (x, layer.packed, 32, None, *layer._settings, 0, None, None)
    torch.library.opcheck(torch.ops.sq_cpu.linear.default, arguments)


def test_models_may_look_at_the_weight_but_not_compute_with_it() -> None:
    layer = QuantLinear.from_float(nn.Linear(6, 4), Scheme.of("O1").resolve(True))
    weight, x = layer.weight, torch.ones(1, 6)
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == ((4, 6), torch.float32, x.device)
    assert repr(weight) == "<packed weight [4, 6], torch.float32>"
    assert x.half().to(weight).dtype == x.half().type_as(weight).dtype == torch.float32
    uses: list[Callable[[], object]] = [
        lambda: nn.functional.linear(x, weight),
        lambda: x @ weight.T,
        lambda: weight.double(),
        lambda: weight.clone(),
        lambda: weight[0],
        lambda: weight.data,
        lambda: nn.init.normal_(weight),
    ]
    for use in uses:
        with pytest.raises(SqCpuError, match=r"quantize with a calibration.*weight_int8\(\)"):
            use()
    assert not list(layer.parameters())
    assert torch.equal(layer.state_dict()["weight"], layer.weight_int8())


@pytest.mark.parametrize("outliers", [None, 2.0])
def test_the_weight_has_the_dtype_that_the_model_computes_in(outliers: float | None) -> None:
    scheme = Scheme(outlier_threshold=outliers).resolve(True)
    layer: Any
    if outliers is None:
        layer = QuantLinear.from_float(nn.Linear(6, 4).bfloat16(), scheme)
    else:
        channels = torch.tensor([1, 3])
        layer = DecomposedLinear.from_float(nn.Linear(6, 4).bfloat16(), scheme, channels)
    assert layer.weight.dtype == torch.bfloat16
    for model in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert model.half().weight.dtype == torch.float16
        assert nn.Sequential(model).to(torch.float32)[0].weight.dtype == torch.float32
        assert model.to(torch.bfloat16).share_memory().weight.dtype == torch.bfloat16
        assert model.weight.shape == (4, 6)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_input_has_the_name_that_linears_give_it(outliers: bool) -> None:
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer: nn.Module
    if outliers:
        layer = DecomposedLinear.from_float(linear, Scheme(), torch.tensor([1, 3]))
    else:
        layer = QuantLinear.from_float(linear, Scheme())
    assert torch.equal(layer(input=x), layer(x))
