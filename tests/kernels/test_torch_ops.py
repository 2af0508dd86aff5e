"""The torch operators: by torch's own checks, with gradients, batches, profiles and FLOPs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, silu
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.kernels.embedding import gather_rows
from sq_cpu.nn.counting import row_counts
from sq_cpu.nn.decomposed import DecomposedLinear

K, N = 70, 33
OPS = torch.ops.sq_cpu
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(scheme: Scheme | None = None, smoothed: bool = True, hadamard: int = 0) -> QuantLinear:
    scheme = scheme or Scheme()
    input_range = (-3.0, 3.0) if scheme.activations == "static" else None
    s = torch.logspace(-1, 1, K) if smoothed else None
    linear = nn.Linear(K, N).requires_grad_(False)
    return QuantLinear.from_float(linear, scheme, input_range, smoothing=s, hadamard=hadamard)


SCHEMES = [
    Scheme(),
    Scheme(symmetric=False, reduce_range=True),
    Scheme(activations="per_token_x2"),
    Scheme.of("O2"),
    Scheme.of("O3"),
]
LAYERS = [(scheme, smoothed, 64 * smoothed) for scheme in SCHEMES for smoothed in (False, True)]


def arguments(layer: QuantLinear, x: Tensor) -> list[Any]:
    settings = (*layer._settings, 0, None, None)
    return [x, layer.packed, N, layer.inverse_smoothing, *settings]


@pytest.mark.parametrize(("scheme", "smoothed", "hadamard"), LAYERS)
def test_the_operator_gives_what_the_layer_gives(
    scheme: Scheme, smoothed: bool, hadamard: int
) -> None:
    layer = make(scheme, smoothed, hadamard)
    for leading in ((), (0,), (1,), (17,), (2, 3), (1,) * 9):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(*leading, K).to(dtype)
            assert torch.equal(OPS.linear(*arguments(layer, x)), layer(x))
    x = torch.randn(K, 5).T
    assert torch.equal(OPS.linear(*arguments(layer, x)), layer(x))


def test_torchs_own_checks_of_every_operator() -> None:
    layer, x = make(hadamard=64), torch.randn(5, K)
    other, residual = torch.randn(5, N), torch.randn(5, N)
    a, b = torch.ones(1, 4, 5, 8, dtype=torch.int8), torch.ones(1, 2, 7, 8, dtype=torch.int8)
    ids = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    head = make()
    checked: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.linear, tuple(arguments(layer, x))),
        (OPS.linear, (*arguments(layer, x)[:-3], 4, other, residual)),
        (OPS.gather_rows, (ids, head.packed, N, K, head.inverse_smoothing, 1)),
        (OPS.unpack_weight, (head.packed, N, K)),
        (OPS.batched_matmul, (a, b, True, 0.5, torch.rand(1, 4, 5), None, 4)),
    ]
    has_tags = torch.__version__ >= (2, 12)  # before, the stable interface defines none
    for op, given in checked:
        assert (torch.Tag.pt2_compliant_tag in op.default.tags) is has_tags
        torch.library.opcheck(op.default, given)
    assert {op for op, _ in checked} == {getattr(OPS, name) for name in defined()}


def defined() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("sq_cpu::") for name in names if name.startswith("sq_cpu::")}


def test_the_other_operators_give_what_the_functions_give() -> None:
    head = make()
    ids = torch.tensor([[3, 1, 32]], dtype=torch.int32)
    rows = gather_rows(ids, head.packed, N, K, head.inverse_smoothing, torch.bfloat16)
    assert torch.equal(OPS.gather_rows(ids, head.packed, N, K, head.inverse_smoothing, 1), rows)
    codes, scale = OPS.unpack_weight(head.packed, N, K)
    assert torch.equal(codes, head.weight_int8())
    assert torch.equal(scale, head.weight_scale)
    with pytest.raises(RuntimeError, match="33"):
        OPS.gather_rows(ids + 1, head.packed, N, K, None, 0)
    with pytest.raises(RuntimeError, match="unknown type 5"):
        OPS.gather_rows(ids, head.packed, N, K, None, 5)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scheme", "smoothed", "hadamard"), LAYERS)
def test_gradients_go_straight_through_the_rounding(
    scheme: Scheme, smoothed: bool, hadamard: int, dtype: torch.dtype
) -> None:
    layer = make(scheme, smoothed, hadamard)
    x = torch.randn(2, 3, K).to(dtype).requires_grad_()
    with torch.no_grad():
        expected = layer(x)
    y = layer(x)
    assert torch.equal(y, expected)
    assert y.requires_grad
    dy = torch.randn(2, 3, N).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ layer.weight_float().double()
    assert dx.dtype == dtype
    # Each product of dy and a scale, each sum, and dx are rounded to dtype (fp16: dx alone).
    size = dy.double().abs() @ layer.weight_float().double().abs()
    # The rotation adds up 64 columns, divided by 8.
    spread = 8 * size.amax() if hadamard else size
    assert ((dx - exact).abs() <= 4 * torch.finfo(dtype).eps * spread).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_gradients_pass_every_step_of_an_epilogue(activation: Any) -> None:
    layer = make()
    x, other, residual = (torch.randn(5, n, requires_grad=True) for n in (K, N, N))
    steps = {"activation": activation, "other": other, "residual": residual}
    y = layer(x, **steps)
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x, **steps), rtol=2e-6, atol=1e-6)
    functions: dict[Any, Any] = {None: lambda v: v, "relu": torch.relu, "silu": silu, "gelu": gelu}
    functions["gelu_tanh"] = lambda v: gelu(v, approximate="tanh")
    v = torch.nn.functional.linear(x, layer.weight_float())
    v = v + (layer(x) - v).detach()  # the layer's values, the float layer's gradients
    plain = functions[activation](v) * other + residual
    dy = torch.randn(5, N)
    given = torch.autograd.grad(y, (x, other, residual), dy)
    wanted = torch.autograd.grad(plain, (x, other, residual), dy)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    (only,) = torch.autograd.grad(layer(x.detach(), **steps), residual, dy)
    assert torch.equal(only, dy)
    with pytest.raises(SqCpuError, match="other is"):
        layer(x, other=other[:2])


def test_a_decomposed_layer_has_the_gradient_of_both_parts() -> None:
    linear = nn.Linear(K, N).requires_grad_(False)
    layer = DecomposedLinear.from_float(linear, Scheme(), torch.tensor([3, 9]))
    x = torch.randn(5, K, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    weight = layer.regular.weight_float()
    weight[:, layer.columns] = layer.outlier_weight
    torch.testing.assert_close(dx, weight.sum(dim=0).expand(5, K))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_gradients_in_a_compiled_model() -> None:
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(N, 4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, K)
    found = []
    for run in (model, compiled):
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        found.append((given.grad, model[2].weight.grad))
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_are_right_or_refused() -> None:
    layer, x = make(), torch.randn(4, K)
    summed = lambda row: layer(row).sum()  # noqa: E731
    dx = layer.weight_float().sum(dim=0)
    torch.testing.assert_close(torch.func.grad(summed)(x[0]), dx)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(summed))(x), dx.expand(4, K))
    _, pull = torch.func.vjp(layer, x)
    torch.testing.assert_close(pull(torch.ones(4, N))[0], dx.expand(4, K))
    for forward in (
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.func.jacfwd(layer)(x[0]),
        lambda: torch.func.jvp(lambda r: layer(x, residual=r), (layer(x),), (layer(x),)),
    ):
        with pytest.raises(SqCpuError, match=r"no forward-mode derivative \(jvp\)"):
            forward()
    with forward_ad.dual_level():
        with pytest.raises(SqCpuError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(x, x))
        assert torch.equal(layer(x), OPS.linear(*arguments(layer, x)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.activations)
def test_a_batch_of_calls_is_each_call(scheme: Scheme) -> None:
    layer = make(scheme)
    x, other = torch.randn(3, 5, K), torch.randn(5, 3, N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of an operator that it must loop over
        y = torch.vmap(layer)(x)
        steps = torch.vmap(
            lambda x, other: layer(x, activation="silu", other=other, residual=other),
            in_dims=(0, 1),
        )(x, other)
        shared = torch.vmap(lambda r: layer(x[0], residual=r), in_dims=1)(other)
    for i in range(3):
        each = other[:, i]
        assert torch.equal(y[i], layer(x[i]))
        assert torch.equal(
            steps[i], layer(x[i], activation="silu", other=each, residual=each.contiguous())
        )
        assert torch.equal(shared[i], layer(x[0], residual=each))


# --- what torch's tools see -----------------------------------------------------------------------


def test_a_profile_names_the_layer_and_its_rows_count() -> None:
    layer, x = make(Scheme.of("O3")), torch.randn(5, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        row_counts(layer, reset=True)
        for run in (layer, compiled):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                y = run(x)
            names = [event.name for event in profiled.events()]
            assert names.count("sq_cpu::linear") == 1
            assert torch.equal(y, layer(x))
    assert row_counts(layer)[""].rows >= 5


def test_flops_are_counted() -> None:
    layer = make()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 5, K))
    assert counter.get_total_flops() == 2 * 10 * K * N
    q, k = torch.ones(1, 4, 5, 8, dtype=torch.int8), torch.ones(1, 2, 7, 8, dtype=torch.int8)
    with FlopCounterMode(display=False) as counter:
        OPS.batched_matmul(q, k, True, 1.0, None, None, 0)
    assert counter.get_total_flops() == 2 * 4 * 5 * 7 * 8


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_takes_any_length_and_survives_a_file(
    strict: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(make(Scheme.of("O3"), hadamard=64))
    rows = torch.export.Dim("rows", min=1, max=512)
    program = torch.export.export(
        model, (torch.randn(4, K),), dynamic_shapes=({0: rows},), strict=strict
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for m in (1, 4, 33):
            x = torch.randn(m, K)
            assert torch.equal(loaded(x), model(x))


def test_a_trace_of_symbolic_shapes_holds_for_others() -> None:
    layer = make()
    traced: Any = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        torch.randn(5, K)
    )
    x = torch.randn(9, K)
    assert torch.equal(traced(x), layer(x))


def test_the_operators_are_added_once() -> None:
    def schemas() -> list[str]:
        every: list[Any] = torch._C._jit_get_all_schemas()
        return sorted(str(each) for each in every if each.name.startswith("sq_cpu::"))

    before = schemas()
    assert len(before) == len(set(before)) > 0
    _core.add_torch_operators()
    assert schemas() == before


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_process_without_torch_or_with_an_old_one_is_told(tmp_path: Path) -> None:
    # Another library under the name of torch's: it has none of the functions.
    old = tmp_path / "libtorch_cpu.so"
    subprocess.run(
        [COMPILER, "-shared", "-x", "c++", "/dev/null", "-o", old, f"-Wl,-soname,{old.name}"],
        check=True,
    )
    maps = Path("/proc/self/maps").read_text().split()
    openmp = next(path for path in maps if Path(path).name.startswith(("libgomp", "libiomp5")))
    library = Path(_core.__file__).parent / "lib/libsq_cpu_torch.so"
    said = []
    for torch_library in (None, old):
        program = f"""import ctypes
for each in {[openmp, *([str(torch_library)] if torch_library else [])]}:
    ctypes.CDLL(each, ctypes.RTLD_GLOBAL)
add = ctypes.CDLL({str(library)!r}).sq_cpu_add_torch_operators
add.restype = ctypes.c_char_p
print(add().decode())"""
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        said.append(done.stdout.strip())
    assert said == [
        "no libtorch_cpu.so is loaded: load torch first",
        "this torch has no aoti_torch_library_init_fragment: install torch 2.8 or newer",
    ]


@pytest.mark.parametrize("hadamard", [0, 64])
def test_an_exported_layer_has_the_gradient_of_the_layer(hadamard: int) -> None:
    layer, x = make(hadamard=hadamard), torch.randn(5, K, requires_grad=True)
    program = torch.export.export(layer, (torch.randn(5, K),)).module()
    made = [torch.autograd.grad(each(x).square().sum(), x)[0] for each in (layer, program)]
    assert torch.equal(*made)
    assert made[0].abs().min() > 0
    fused = (*arguments(layer, x)[:-3], 4, None, None)
    with pytest.raises(SqCpuError, match="no gradient through its activation, other and residual"):
        OPS.linear(*fused).sum().backward()


def test_a_layer_made_in_inference_mode_has_gradients() -> None:
    with torch.inference_mode():
        layer = make(hadamard=64)
    x = torch.randn(2, K, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    assert found.abs().min() > 0
