"""Shared quantized inputs, epilogues, int8 out and smoothing: the kernels against plain torch."""

import copy
import itertools
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels import _core, ops
from sq_cpu.kernels.ops import Activation, QuantizedActivation
from sq_cpu.numerics.rounding import quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative; and absolute, of the smallest (subnormal) numbers.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}
ROWS = (1, 2, 15, 16, 17, 33)
SCHEMES = {
    "per_token": Scheme(),
    "per_token-asym-7bit": Scheme(symmetric=False, reduce_range=True),
    "per_tensor": Scheme.of("O2"),
    "static": Scheme.of("O3"),
    "static-asym": Scheme.of("O3", symmetric=False),
}
each_scheme = pytest.mark.parametrize("scheme", list(SCHEMES.values()), ids=list(SCHEMES))


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def make(k: int, n: int, scheme: Scheme, smoothing: Tensor | None = None) -> QuantLinear:
    input_range = (-2.5, 3.0) if scheme.activations == "static" else None
    return QuantLinear.from_float(nn.Linear(k, n), scheme, input_range, smoothing=smoothing)


def scales(k: int) -> Tensor:
    return torch.logspace(-2, 2, k) if k > 1 else torch.tensor([0.3])


def static(layer: QuantLinear) -> tuple[float, int] | None:
    return None if layer.input_scale is None else (layer.input_scale, layer.input_zero_point)


@each_scheme
def test_exact_steps_equal_the_reference(each_isa: str, scheme: Scheme) -> None:
    for k, n in ((1, 1), (65, 33), (200, 70)):
        layer = make(k, n, scheme)
        for m, dtype in itertools.product(ROWS, DTYPES):
            x = torch.randn(m, k).to(dtype)
            other, residual = torch.randn(2, m, n).to(dtype)
            x[m // 2, k // 2] = float("nan") if m > 1 else 1.0
            steps: dict[str, Any]
            for steps in (
                {"activation": "relu"},
                {"other": other},
                {"residual": residual},
                {"activation": "relu", "other": other, "residual": residual},
            ):
                y = layer(x, **steps)
                torch.testing.assert_close(
                    y, layer.reference(x, **steps), rtol=0, atol=0, equal_nan=True
                )
                assert y.isnan().any(1).tolist() == x.isnan().any(1).tolist()


@pytest.mark.parametrize("activation", [name for name in get_args(Activation) if name != "relu"])
def test_other_activations_are_within_their_bound(each_isa: str, activation: Activation) -> None:
    exact: Callable[[Tensor], Tensor] = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "silu": nn.functional.silu,
    }[activation]
    layer = make(65, 33, Scheme())
    for m, dtype in itertools.product(ROWS, DTYPES):
        x = (4 * torch.randn(m, 65)).to(dtype)
        other, residual = torch.randn(2, m, 33).to(dtype)
        product = exact(layer.reference(x.float()).double()) * other.double()
        y = product + residual.double()
        # cpp/activations.h: 3.5e-7; then two fp32 roundings and one to y's dtype.
        bound = 3.5e-7 * product.abs() + 2.0**-24 * (product.abs() + y.abs())
        bound = 1.001 * (bound + ROUNDING[dtype] * y.abs()) + SMALLEST[dtype]
        found = layer(x, activation=activation, other=other, residual=residual)
        assert found.dtype == dtype
        assert ((found.double() - y).abs() <= bound).all()
        # The plain-torch reference is held to the same.
        reference = layer.reference(x, activation=activation, other=other, residual=residual)
        assert ((reference.double() - y).abs() <= bound).all()


@each_scheme
def test_a_quantized_input_gives_the_same_bits(each_isa: str, scheme: Scheme) -> None:
    for k, n in ((1, 1), (65, 33), (128, 70)):
        first, second = make(k, n, scheme), make(k, 2 * n, scheme)
        for m, dtype in itertools.product(ROWS, DTYPES):
            x = torch.randn(m, k).to(dtype)
            other = torch.randn(m, n).to(dtype)
            x[0, 0] = float("inf") if m > 1 else 1.0
            q = first.quantize_input(x)
            codes, scale, zero_point = quantize_rows(x.float(), scheme, static(first))
            good = scale.isfinite()
            assert torch.equal(q.rows()[good], codes[good])
            assert torch.equal(q.scale.isfinite(), good)
            assert torch.equal(q.scale[good], scale[good])
            assert torch.equal(q.zero_point[good], zero_point[good])
            assert (q.max_code, q.dtype, q.leading) == (scheme.levels, dtype, (m,))
            same = {"rtol": 0, "atol": 0, "equal_nan": True}
            torch.testing.assert_close(first(q), first(x), **same)
            torch.testing.assert_close(second(q), second(x), **same)
            torch.testing.assert_close(
                first(q, activation="gelu", other=other),
                first(x, activation="gelu", other=other),
                **same,
            )


def test_a_quantized_input_keeps_its_shape_and_its_values() -> None:
    layer = make(96, 20, Scheme())
    x = torch.randn(3, 7, 96)
    q = layer.quantize_input(x)
    assert layer(q).shape == (3, 7, 20)
    assert torch.equal(layer(q), layer(x))
    # Half a step of each row, and a rounding of the product.
    assert ((q.dequantize() - x).abs() <= 0.5001 * q.scale.view(3, 7, 1)).all()
    assert layer(layer.quantize_input(torch.ones(96))).shape == (20,)
    empty = layer.quantize_input(torch.ones(0, 96))
    assert empty.rows().shape == empty.dequantize().shape == (0, 96)
    assert layer(empty).shape == (0, 20)
    assert torch.equal(layer(pickle.loads(pickle.dumps(q))), layer(x))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("to", [SCHEMES["static"], SCHEMES["static-asym"]], ids=["sym", "asym"])
def test_int8_layers_chain(each_isa: str, to: Scheme, smoothed: bool) -> None:
    for n in (1, 33, 128):
        first = make(65, n, Scheme(symmetric=False), scales(65) if smoothed else None)
        second = make(n, 20, to)
        static_rows = copy.copy(second)  # a product's codes have no scale of their own
        static_rows.scheme = replace(to, dynamic_fallback=False)
        for m, dtype in itertools.product(ROWS, DTYPES):
            x = torch.randn(m, 65).to(dtype)
            other, residual = torch.randn(2, m, n).to(dtype)
            x[m // 2, 3] = float("nan") if m > 1 else 1.0
            steps: dict[str, Any]
            for steps in ({}, {"activation": "relu", "other": other, "residual": residual}):
                q = first.forward_int8(x, second, **steps)
                y = first.reference(
                    x.float(),
                    **{k: v.float() if k != "activation" else v for k, v in steps.items()},
                )
                codes, scale, zero_point = quantize_rows(y, static_rows.scheme, static(second))
                good = scale.isfinite()
                assert good.tolist() == x.isfinite().all(1).tolist()
                assert torch.equal(q.rows()[good], codes[good])
                assert torch.equal(q.scale[good], scale[good])
                assert q.scale[~good].isnan().all()
                assert torch.equal(q.zero_point, zero_point)
                out = second(q)
                assert out.dtype == dtype
                assert out[~good].isnan().all()
                assert torch.equal(out[good], static_rows.reference(y).to(dtype)[good])
                again = first.forward_int8(first.quantize_input(x), second, **steps)
                assert torch.equal(second(again)[good], out[good])


@each_scheme
def test_smoothing_equals_the_reference(each_isa: str, scheme: Scheme) -> None:
    for k, n in ((1, 1), (65, 33), (200, 70)):
        layer = make(k, n, scheme, scales(k))
        for m, dtype in itertools.product(ROWS, DTYPES):
            x = (torch.randn(m, k) * scales(k)).to(dtype)
            assert torch.equal(layer(x), layer.reference(x))
            assert torch.equal(layer(layer.quantize_input(x)), layer(x))


def test_smoothing_is_the_folded_layer() -> None:
    linear = nn.Linear(96, 20)
    s = 2.0 ** torch.randint(-6, 6, (96,))  # powers of two: every product is exact
    x = torch.randn(5, 96)
    folded = copy.deepcopy(linear)
    folded.weight.mul_(s)
    smoothed = QuantLinear.from_float(linear, Scheme(), smoothing=s.to(torch.bfloat16))
    assert torch.equal(smoothed(x), QuantLinear.from_float(folded, Scheme())(x / s))
    assert smoothed.smoothing is not None
    assert torch.equal(smoothed.smoothing, s)
    plain = QuantLinear.from_float(linear, Scheme())
    outlier = x.clone()
    outlier[:, 7] *= 1000
    s = torch.ones(96)
    s[7] = 100
    better = QuantLinear.from_float(linear, Scheme(), smoothing=s)
    y = linear(outlier)
    assert (better(outlier) - y).norm() < 0.5 * (plain(outlier) - y).norm()


@each_scheme
def test_smoothing_survives_an_ordinary_life(scheme: Scheme) -> None:
    s = torch.rand(70) + 0.1
    layer = make(70, 20, scheme, s)
    x = torch.randn(3, 70)
    y, state = layer(x), layer.state_dict()
    assert torch.equal(state["smoothing"], s)
    assert state["smoothing"].dtype == torch.float32
    assert layer.entries()["smoothing"] == ((70,), torch.float32)
    assert layer.nbytes == layer.packed.nbytes + 3 * s.nbytes
    state["smoothing"].mul_(2)  # a copy, as all of the state dict
    s.mul_(2)
    assert torch.equal(layer(x), y)
    other = QuantLinear(70, 20, scheme, bias=True, smoothed=True)
    other.load_state_dict(layer.state_dict())
    for twin in (
        other,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).half().float(),
        copy.deepcopy(layer).share_memory(),
    ):
        assert torch.equal(twin(x), y)
        assert torch.equal(twin.state_dict()["smoothing"], layer.state_dict()["smoothing"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"smoothing"'):
        QuantLinear(70, 20, scheme, bias=True).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"smoothing"'):
        layer.load_state_dict(make(70, 20, scheme).state_dict())
    with pytest.raises(SqCpuError, match="smoothing scale or its reciprocal"):
        layer.load_state_dict(layer.state_dict() | {"smoothing": torch.zeros(70)})
    assert torch.equal(layer(x), y)


def fails(match: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(SqCpuError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_operands_are_one_clear_line() -> None:
    layer = make(8, 4, Scheme())
    x, q = torch.randn(2, 8), layer.quantize_input(torch.randn(2, 8))
    y = torch.zeros(2, 4)
    fails(
        "activation is 'tanh', known are relu, gelu, gelu_tanh, silu", layer, x, activation="tanh"
    )
    for call in (x, q):
        fails(r"other is torch.float32 \[4\] on cpu, the output", layer, call, other=y[0])
        fails(r"residual is torch.float64 \[2, 4\]", layer, call, residual=y.double())
        fails("residual is .* on meta", layer, call, residual=y.to("meta"))
    with torch.enable_grad():
        fails("no_grad", layer, q, other=y.clone().requires_grad_())
    for bad in (torch.zeros(8), torch.full((8,), float("inf")), torch.full((8,), float("nan"))):
        fails("smoothing scale or its reciprocal", make, 8, 4, Scheme(), bad)
    fails(r"smoothing scale is \[7\], the layer needs \[8\]", make, 8, 4, Scheme(), torch.ones(7))


def test_a_foreign_quantized_input_is_refused() -> None:
    x = torch.randn(2, 8)
    layer = make(8, 4, Scheme())
    others = [
        make(8, 4, Scheme(symmetric=False)),
        make(8, 4, Scheme(reduce_range=True)),
        make(8, 4, Scheme.of("O2")),
        make(8, 4, Scheme.of("O3")),
        make(8, 4, Scheme(), torch.full((8,), 2.0)),
    ]
    for other in others:
        fails("quantized by another scheme", layer, other.quantize_input(x))
        fails("quantized by another scheme", other, layer.quantize_input(x))
    wider = QuantLinear.from_float(nn.Linear(8, 4), Scheme.of("O3"), (-3.0, 3.5))
    fails("quantized by another scheme", others[3], wider.quantize_input(x))
    fails(
        r"quantized \[..., 9\], the layer needs \[..., 8\]",
        layer,
        make(9, 4, Scheme()).quantize_input(torch.randn(2, 9)),
    )
    fails(r"input is \[2, 7\]", layer.quantize_input, torch.zeros(2, 7))
    fails("input is torch.float64", layer.quantize_input, x.double())


def test_a_next_layer_that_does_not_fit_is_refused() -> None:
    layer, x = make(8, 16, Scheme()), torch.randn(2, 8)
    smoothed = make(16, 4, Scheme.of("O3"), torch.full((16,), 2.0))
    fails(
        "next layer takes 15 features, this one gives 16",
        layer.forward_int8,
        x,
        make(15, 4, Scheme()),
    )
    fails("need its static input scale", layer.forward_int8, x, make(16, 4, Scheme()))
    fails("no smoothing", layer.forward_int8, x, smoothed)


def test_what_traces_sees_every_step() -> None:
    layer = make(64, 32, Scheme.of("O3"), scales(64))
    x, other, residual = torch.randn(5, 64), torch.randn(5, 32), torch.randn(5, 32)

    def step(x: Tensor, other: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = layer(x, activation="silu", other=other, residual=residual)
        return y

    y = step(x, other, residual)
    traced: Any = make_fx(step)(x, other, residual)
    assert torch.equal(traced(x, other, residual), y)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, other, residual), y)
    silu = int(_core.Activation.silu)
    arguments = (x, layer.packed, 32, layer.inverse_smoothing, *layer._settings, silu)
    torch.library.opcheck(torch.ops.sq_cpu.linear.default, (*arguments, other, residual))
    with pytest.raises(SqCpuError, match="quantize_input cannot be traced"):
        make_fx(lambda x: layer.quantize_input(x).scale)(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decoder_block_of_a_real_model(
    smollm2: Callable[[], tuple[Any, Any]], dtype: torch.dtype
) -> None:
    model, tokenizer = smollm2()
    block = model.model.layers[3]
    inputs: dict[str, Tensor] = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].to(dtype)})
        )
    model(torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog.")]))

    def int8(name: str) -> QuantLinear:
        return QuantLinear.from_float(block.get_submodule(name), Scheme())

    q, k, v = (int8(f"self_attn.{name}_proj") for name in "qkv")
    x = inputs["self_attn.q_proj"]
    shared = q.quantize_input(x)
    assert isinstance(shared, QuantizedActivation)
    for layer in (q, k, v):
        assert torch.equal(layer(shared), layer(x))

    gate, up, down = (int8(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    shared = gate.quantize_input(inputs["mlp.gate_proj"])
    multiplier = up(shared)
    fused = gate(shared, activation="silu", other=multiplier).double()
    # Unfused, the gate, SiLU and the product are rounded one by one; SiLU's slope is below 1.1,
    # and x silu'(x) / silu(x) is not bounded where x is very negative: hence of the value.
    value = gate(shared)
    unfused = (nn.functional.silu(value) * multiplier).double()
    error = ROUNDING[dtype] * (3 * unfused.abs() + 1.1 * (value * multiplier).double().abs())
    error += 4e-7 * unfused.abs() + 2 * SMALLEST[dtype] * (1 + multiplier.double().abs())
    assert ((fused - unfused).abs() <= 1.01 * error).all()

    x = inputs["mlp.down_proj"]
    residual = inputs["self_attn.q_proj"]
    fused = down(x, residual=residual).double()
    # Unfused, the sum is rounded once more before the residual is added.
    exact = down(x.float()).double() + residual.double()
    unfused = (down(x) + residual).double()
    error = ROUNDING[dtype] * (down(x).double().abs() + 2 * exact.abs()) + 2 * SMALLEST[dtype]
    assert ((fused - unfused).abs() <= 1.01 * error).all()
    assert (
        (fused - exact).abs() <= 1.01 * (ROUNDING[dtype] + 2.0**-24) * exact.abs() + SMALLEST[dtype]
    ).all()


def fast(layer: QuantLinear, x: object) -> Tensor | None:
    sizes = layer.in_features, layer.out_features
    return _core.linear_tensor(x, layer.packed, *sizes, layer._quantizer)


@each_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_way_gives_the_same_bits(scheme: Scheme, dtype: torch.dtype) -> None:
    layer = make(65, 33, scheme, scales(65))
    for leading in ((), (0,), (1,), (17,), (2, 3), (2, 0, 3), (1,) * 7):
        x = torch.randn(*leading, 65).to(dtype)
        y = fast(layer, x)
        assert y is not None
        assert (y.shape, y.dtype) == ((*leading, 33), dtype)
        assert torch.equal(y, ops.linear(x, layer.packed, 65, 33, layer._quantizer))
        assert torch.equal(y, layer(x))


def test_the_short_way_leaves_what_is_irregular() -> None:
    layer = make(8, 4, Scheme())
    x = torch.randn(5, 8)
    irregular: list[object] = [
        x.double(),
        x[:, :7].contiguous(),
        torch.tensor(1.0),
        torch.zeros(2, 8, device="meta"),
        torch.zeros(2, 8, requires_grad=True),
        torch._neg_view(x),
        torch.randn(8, 5).T,
        torch.randn((1,) * 8 + (8,)),
        nn.Parameter(x, requires_grad=False),
        None,
    ]
    assert [fast(layer, each) for each in irregular] == [None] * len(irregular)
    assert fast(layer, x) is not None
    layer.to("meta")
    assert fast(layer, x) is None
    with pytest.raises(SqCpuError, match="weights on meta"):
        layer(x)


def test_the_short_way_counts_its_references() -> None:
    class NoMemory(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.new_empty:
                raise MemoryError("no memory for y")
            return func(*args, **(kwargs or {}))

    layer = make(2000, 3000, Scheme())
    x, wrong = torch.randn(1000, 2000)[:1], torch.randn(2, 1999)
    held = (x, wrong, layer.packed, layer._quantizer, x.dtype)
    other = x.new_empty(1, 3000)

    def counts() -> list[int]:
        return [sys.getrefcount(each) for each in held]

    before = counts()
    for _ in range(100):
        y = fast(layer, x)
        assert sys.getrefcount(y) == sys.getrefcount(other)
        assert fast(layer, wrong) is None
        with NoMemory(), pytest.raises(MemoryError, match="no memory for y"):
            fast(layer, x)
    assert counts() == before
