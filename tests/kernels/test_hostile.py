"""Hostile calls of every function through which Python reaches the kernels.

Each gives a result or an `SqCpuError` of one line: no crash, no other exception, no memory beyond
what the result takes. A call is a good one of which one to three arguments are replaced by extremes
of their annotated type. The annotations are the functions' own, so one without a row here fails.

SQ_CPU_HOSTILE_CASES is the number of calls of each function. The seed of a call is its number.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import os
import random
import re
import resource
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import sq_cpu
from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels import _core, attention, embedding, ops, runtime
from sq_cpu.kernels.ops import Activation, Epilogue, QuantizedActivation
from sq_cpu.nn.packed_weight import PackedWeight

CASES = int(os.environ.get("SQ_CPU_HOSTILE_CASES", "150"))
M, N, K = 3, 33, 65
PACKAGE = str(Path(sq_cpu.__path__[0]).resolve())
MOST_NEW_BYTES = 1 << 30


@functools.cache
def layers() -> dict[str, QuantLinear]:
    torch.manual_seed(0)
    static = Scheme(activations="static")
    made = {
        "dynamic": QuantLinear.from_float(nn.Linear(K, N), Scheme()),
        "seven bits": QuantLinear.from_float(nn.Linear(K, N), Scheme(reduce_range=True)),
        "smoothed": QuantLinear.from_float(nn.Linear(K, N), Scheme(), smoothing=torch.ones(K)),
        "next": QuantLinear.from_float(nn.Linear(N, K), static, (-1.0, 1.0)),
    }
    return made


def good() -> dict[str, Any]:
    """Make a good argument of each name that has one meaning in all functions."""
    layer = layers()["dynamic"]
    with torch.no_grad():
        q = layer.quantize_input(torch.randn(M, K))
        static = layers()["next"].quantize_input(torch.randn(M, N))
    return {
        "x": torch.randn(M, K),
        "input": torch.randn(M, K),
        "packed": layer.packed.clone(),
        "n": N,
        "k": K,
        "m": M,
        "in_features": K,
        "out_features": N,
        "quantizer": layer._quantizer,
        "y": torch.empty(M, N),
        "activation": _core.Activation.silu,
        "other": torch.randn(M, N),
        "residual": torch.randn(M, N),
        "codes": q.codes,
        "scale": q.scale,
        "zero_point": q.zero_point,
        "max_code": 255,
        "terms": 1,
        "ids": torch.randint(0, N, (2, M)),
        "y_quantizer": layers()["next"]._quantizer,
        "y_codes": static.codes,
        "y_scale": static.scale,
        "y_zero_point": static.zero_point,
        "operand_type": _core.DType.float32,
        "alpha": 0.5,
        "a": torch.randint(-128, 128, (2, 4, M, K), dtype=torch.int8),
        "b": torch.randint(-128, 128, (2, 2, N, K), dtype=torch.int8),
        "a_scale": torch.rand(2, 4, M),
        "b_scale": torch.rand(2, 2, N),
        "transposed": True,
        "name": _core.isa()["in_use"],
        "activations": "per_token",
        "symmetric": True,
        "reduce_range": False,
        "smoothing": torch.rand(K) + 0.5,
        "epilogue": Epilogue("silu", torch.randn(M, N), None),
        "leading": (M,),
        "dtype": torch.float32,
        "out_dtype": torch.float32,
    }


def emulated_no_more(name: str, emulated: bool) -> None:
    """Call use_isa without the promise of an emulator, which only its caller can keep."""
    try:
        _core.use_isa(name, emulated and _core.isa()["isas"].get(name, {}).get("usable", True))
    finally:
        _core.use_isa(BEFORE, False)


BEFORE = _core.isa()["in_use"]
CODES = torch.randint(-128, 128, (2, 4, M, K), dtype=torch.int8)
VALUES = torch.randint(-128, 128, (2, 2, K, N), dtype=torch.int8)

# Where a good argument differs from those of that name above.
OTHERS: dict[str, dict[str, Callable[[], Any]]] = {
    "_core.batched_matmul": {
        "y": lambda: torch.empty(2, 4, M, N),
        "y_type": lambda: _core.BatchedType.float32,
    },
    "_core.gather_rows": {"y": lambda: torch.empty(2, M, K)},
    "_core.gemm": {"y": lambda: torch.empty(M, N, dtype=torch.int32)},
    "_core.pack_weight": {
        "weight": lambda: torch.ones(N, K, dtype=torch.int8),
        "scale": lambda: torch.ones(N),
        "bias": lambda: torch.ones(N),
        "out": lambda: layers()["dynamic"].packed.clone(),
    },
    "_core.unpack_weight": {
        "weight": lambda: torch.ones(N, K, dtype=torch.int8),
        "scale": lambda: torch.ones(N),
        "bias": lambda: torch.ones(N),
    },
    "_core.use_isa": {"emulated": lambda: False},
    "_core.ActivationQuantizer": {
        "granularity": lambda: _core.Granularity.per_token,
        "scale": lambda: 0.1,
        "zero_point": lambda: 128,
        "inverse_smoothing": lambda: [1.0] * K,
    },
    "ops.linear_quantized": {"x": lambda: layers()["dynamic"].quantize_input(torch.randn(M, K))},
    "ops.linear_requantized": {
        "x": lambda: layers()["dynamic"].quantize_input(torch.randn(M, K)),
        "quantizer": lambda: layers()["next"]._quantizer,
    },
    "ops.make_quantizer": {"scale": lambda: 0.1, "zero_point": lambda: 128},
    "ops.check": {"operands": lambda: (torch.randn(M, N),)},
    "attention.matmul_qk": {
        "q": lambda: CODES,
        "k": lambda: CODES[:, :2],
        "scale": lambda: 0.5,
        "q_scale": lambda: torch.rand(2, 4, M),
        "k_scale": lambda: torch.rand(2, 2, M),
    },
    "attention.matmul_pv": {
        "p": lambda: CODES.view(torch.uint8),
        "v": lambda: VALUES,
        "scale": lambda: 0.5,
        "p_scale": lambda: torch.rand(2, 4, M),
        "v_scale": lambda: torch.rand(2, 2, N),
    },
    "torch.ops.linear": {
        "scale": lambda: 0.1,
        "zero_point": lambda: 128,
        "activation": lambda: "relu",
    },
    "torch.ops.batched_matmul": {"scale": lambda: 0.5},
    "QuantLinear": {"scheme": Scheme, "bias": lambda: True, "smoothed": lambda: True},
    "QuantLinear.forward": {"activation": lambda: "silu"},
    "QuantLinear.forward_int8": {
        "next_layer": lambda: layers()["next"],
        "activation": lambda: "silu",
    },
    "PackedWeight": {"buffer": lambda: layers()["dynamic"].packed.clone()},
    "a replaced buffer": {"buffer": lambda: layers()["dynamic"].packed.clone()},
    "PackedWeight.pack": {
        "weight": lambda: torch.ones(N, K, dtype=torch.int8),
        "scale": lambda: torch.ones(N),
        "bias": lambda: torch.ones(N),
    },
}


def core_annotations() -> dict[str, dict[str, str]]:
    """Read the parameters of the extension's functions from its stub, which stubtest compares."""
    tree = ast.parse(Path(_core.__file__).parent.joinpath("_core.pyi").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            found[node.name] = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
        if isinstance(node, ast.ClassDef) and node.name == "ActivationQuantizer":
            (init,) = (each for each in node.body if getattr(each, "name", "") == "__init__")
            arguments = init.args.args[1:]  # type: ignore[union-attr]
            found[node.name] = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
    return found


def annotations(function: Callable[..., Any]) -> dict[str, str]:
    parameters = inspect.signature(function).parameters
    return {name: str(p.annotation) for name, p in parameters.items() if name != "self"}


def schema(operator: Any) -> dict[str, str]:
    kinds = {"Optional[Tensor]": "Tensor | None", "Optional[str]": "str | None"}
    kinds |= {"ScalarType": "torch.dtype", "SymInt": "int"}
    found = {a.name: str(a.type) for a in operator._schema.arguments}
    found = {name: kinds.get(kind, kind) for name, kind in found.items()}
    # custom_op's schema has numbers for dtypes
    return found | {n: "torch.dtype" for n in ("dtype", "out_dtype") if n in found}


@dataclasses.dataclass
class Door:
    call: Callable[..., Any]
    kinds: dict[str, str]


def method(name: str) -> Door:
    """Make the door of a method of QuantLinear, on a layer of any kind."""

    def call(*, layer: str, **arguments: Any) -> Any:
        return getattr(layers()[layer], name)(**arguments)

    kinds = annotations(getattr(QuantLinear, name))
    return Door(lambda layer="dynamic", **rest: call(layer=layer, **rest), kinds)


def with_buffer(buffer: Tensor, x: Tensor) -> list[object]:
    """Use a layer whose buffer was replaced."""
    layer = copy.deepcopy(layers()["dynamic"])
    layer._buffers["packed"] = buffer
    return [layer(x), layer(x, activation="relu"), layer.weight_int8(), layer.state_dict()]


def packed_weight(buffer: Tensor, out_features: int, in_features: int) -> list[object]:
    weight = PackedWeight(buffer, out_features, in_features)
    return [
        weight.weight(),
        weight.scale(),
        weight.bias(),
        weight.unreadable(torch.float32),
        weight.nbytes,
    ]


def activation_of(**parts: Any) -> list[object]:
    quantized = QuantizedActivation(**parts)
    return [quantized.rows(), quantized.dequantize(), quantized.max_code]


def doors() -> dict[str, Door]:
    stub = core_annotations()
    found = {}
    for name, value in vars(_core).items():
        if callable(value) and not isinstance(value, type):
            assert list(inspect.signature(value).parameters) == list(stub[name]), name
            found[f"_core.{name}"] = Door(functools.partial(positional, value), stub[name])
    found["_core.use_isa"].call = emulated_no_more
    name = "ActivationQuantizer"
    found[f"_core.{name}"] = Door(_core.ActivationQuantizer, stub[name])
    for module in (ops, embedding, attention, runtime):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                label = f"{module.__name__.rpartition('.')[2]}.{name}"
                found[label] = Door(value, annotations(value))
    for name in ("linear", "gather_rows", "batched_matmul"):
        operator = getattr(torch.ops.sq_cpu, name).default
        found[f"torch.ops.{name}"] = Door(operator, schema(operator))
    found["QuantLinear"] = Door(QuantLinear, annotations(QuantLinear.__init__))
    found |= {f"QuantLinear.{name}": method(name) for name in METHODS}
    found["PackedWeight"] = Door(packed_weight, annotations(packed_weight))
    whole = functools.partial(PackedWeight.zeros(N, K).pack)
    found["PackedWeight.pack"] = Door(whole, annotations(PackedWeight.pack))
    found["PackedWeight.zeros"] = Door(PackedWeight.zeros, annotations(PackedWeight.zeros))
    fields = {field.name: str(field.type) for field in dataclasses.fields(QuantizedActivation)}
    found["QuantizedActivation"] = Door(activation_of, fields)
    found["a replaced buffer"] = Door(with_buffer, {"buffer": "Tensor", "x": "Tensor"})
    return found


METHODS = ("forward", "forward_int8", "quantize_input", "count_saturation")
# Plain torch, and no kernel: a reference, and torch.empty of any size that it is asked for.
PLAIN = {"attention.matmul_reference", "ops.empty"}


def positional(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(*arguments.values())


# ---------------------------------------------------------------------------------- the extremes

INTEGERS = [0, 1, -1, 2, 15, 17, 63, 127, 128, 255, 256, 65793, 65794, 2**31 - 1, 2**31, 2**32]
INTEGERS += [-(2**31), 2**48, 2**56, 2**62, 2**63 - 1, -(2**63), 2**63, 2**70, -(2**70)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 3.4e38, 1e308, float("inf"), -float("inf")]
FLOATS += [float("nan"), 0.1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8]
DTYPES += [torch.int32, torch.int64, torch.bool, torch.complex64]


class Subclass(Tensor):
    pass


def tensors(t: Tensor, rng: random.Random, is_core: bool) -> Any:
    """Return something else of the kind of t: other values, dtype, shape, layout or place."""
    size = rng.choice([0, 1, 2, t.numel() - 1, t.numel() + 1, 64, 4096])
    flat = torch.zeros(max(size, 0), dtype=t.dtype)
    like = lambda *shape: torch.zeros(shape, dtype=t.dtype)  # noqa: E731
    shape = list(t.shape)
    other = [max(0, s + rng.choice([-1, 0, 0, 1])) for s in shape]
    choices: list[Callable[[], Any]] = [
        lambda: flat,
        lambda: t.to(rng.choice(DTYPES)),
        lambda: like(*other),
        lambda: like(*shape, 1),
        lambda: like(1, *shape),
        lambda: like(0, *shape),
        lambda: like(*shape[:-1], 0),
        lambda: like(*[1] * 9, *shape),
        lambda: like(),
        lambda: t.flatten(),
        lambda: t[..., :-1] if t.dim() else t,
        lambda: t.flatten()[::2],
        lambda: t.mT if t.dim() > 1 else t.flip(0),
        lambda: like(*[1] * len(shape)).expand(shape),
        lambda: like(2**40, 0),
        lambda: like(2**20, 0, K),
        lambda: like(0, 2**40),
        lambda: torch.empty(shape, dtype=t.dtype, device="meta"),
        lambda: torch.empty(shape, dtype=t.dtype, device="meta").expand(shape),
        lambda: t.to_sparse(),
        lambda: torch.full(shape, float("nan")).to(t.dtype),
        lambda: torch.full(shape, 255).to(t.dtype),
        lambda: torch.full(shape, -128).to(t.dtype),
        lambda: torch.full(shape, 3e38).to(t.dtype),
        lambda: torch.randint(0, 255, shape).to(t.dtype),
        lambda: nn.Parameter(t, requires_grad=False),
        lambda: t.clone().as_subclass(Subclass),
        lambda: t.clone().requires_grad_() if t.is_floating_point() else t,
        lambda: torch._neg_view(t),
        lambda: torch._to_functional_tensor(t),
        lambda: torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8)[1:],
        lambda: PackedWeight.zeros(N, K).unreadable(),
        lambda: torch.nested.nested_tensor([torch.zeros(2, K), torch.zeros(3, K)]),
        lambda: torch._efficientzerotensor(shape, dtype=t.dtype),
    ]
    if is_core:  # torch's own functions crash on memory that was taken away
        choices += [lambda: emptied(t), lambda: 3, lambda: "x", lambda: None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds of tensors are prototypes
        try:
            return rng.choice(choices)()
        except (RuntimeError, TypeError):  # there is no such tensor of this dtype or shape
            return flat


def emptied(t: Tensor) -> Tensor:
    taken = t.clone()
    taken.untyped_storage().resize_(0)
    return taken


def replaced(x: QuantizedActivation, rng: random.Random) -> QuantizedActivation:
    """Return x with one part changed, by its constructor or behind its back."""
    name = rng.choice([field.name for field in dataclasses.fields(x)])
    fields = {field.name: str(field.type) for field in dataclasses.fields(x)}
    value = extreme(fields[name], getattr(x, name), rng, is_core=False)
    if rng.random() < 0.5:
        return dataclasses.replace(x, **{name: value})
    if name in ("codes", "scale", "zero_point"):  # of others no constructor is needed
        forged = copy.copy(x)
        object.__setattr__(forged, name, value)
        return forged
    return x


def extreme(kind: str, value: Any, rng: random.Random, *, is_core: bool) -> Any:
    """Return an extreme of an annotated type; a type without one is an error of this test."""
    kinds = kind.split(" | ")
    if "None" in kinds and rng.random() < 0.2:
        return None
    match kinds[0].removesuffix("'>").rpartition(".")[2]:
        case "Tensor" if kinds[1:] == ["QuantizedActivation"] and rng.random() < 0.5:
            layer = layers()[rng.choice(list(layers()))]
            width = layer.in_features
            return replaced(layer.quantize_input(torch.randn(M, width)), rng)
        case "Tensor" | "object":
            t = value if isinstance(value, Tensor) else torch.randn(M, K)
            return tensors(t, rng, is_core)
        case "int":
            return rng.choice([*INTEGERS, value - 1, value + 1])
        case "float":
            return rng.choice(FLOATS)
        case "bool":
            return not value
        case "str" | "Activation" if isinstance(value, str):
            names = ["", "static", "per_tensor", "__class__", "name", "a" * 10**5, "\0"]
            return rng.choice([*names, *get_args(Activation), "avx2", "reference"])
        case "DType" | "Activation" | "BatchedType" | "Granularity" as name:
            enum: Any = getattr(_core, name)
            return enum(rng.choice([0, 1, 2, 3, 4, 5, 99, 2**31 - 1]))
        case "ActivationQuantizer":
            layer = layers()[rng.choice(list(layers()))]
            return layer._quantizer
        case "dtype":
            return rng.choice(DTYPES)
        case "Epilogue":
            parts = [extreme("Tensor | None", torch.randn(M, N), rng, is_core=False) for _ in "12"]
            return Epilogue(rng.choice(["relu", "gelu", "tanh", None]), *parts)
        case "QuantizedActivation":
            return replaced(value, rng)
        case "Scheme":
            return rng.choice([Scheme(), Scheme(activations="static"), Scheme(symmetric=False)])
        case "QuantLinear":
            return layers()[rng.choice(list(layers()))]
        case _ if kinds[0] == "Iterable[Tensor]":
            return [extreme("Tensor", each, rng, is_core=False) for each in value]
        case _ if kinds[0] in ("tuple[int, ...]", "Sequence[float]"):
            element = "int" if "int" in kinds[0] else "float"
            several = [extreme(element, 1, rng, is_core=False)]
            return value[:-1] if rng.random() < 0.3 else several
    raise AssertionError(f"the annotation {kind} has no extremes: add a row")


DOORS = {name: door for name, door in doors().items() if name not in PLAIN}


def test_every_method_of_the_layer_has_a_row() -> None:
    own = {name for name, f in vars(QuantLinear).items() if inspect.isfunction(f)}
    # from_float, reference and the methods without arguments are plain torch around the others
    plain = {"from_float", "reference", "weight_int8", "extra_repr", "entries"}
    assert {name for name in own if not name.startswith("_")} - plain == set(METHODS)
    assert OTHERS.keys() <= DOORS.keys()


def test_every_function_of_the_cpp_headers_has_a_row() -> None:
    root = Path(__file__).resolve().parents[2]
    declared = {
        name
        for header in (root / "cpp/include/sq_cpu").glob("*.h")
        for name in re.findall(r"^[A-Za-z][\w:<>&* ]*?(\w+)\([^()]*\) *;", header.read_text(), re.M)
    }
    assert {"linear", "gemm", "packed_bytes", "isa_name", "batched_matmul"} <= declared
    rows = re.findall(r'attack\("(\w+)"', (root / "tests/cpp/test_hostile.cc").read_text())
    # Those without parameters cannot be called wrongly.
    assert declared - set(rows) == {"isa_status", "active_isa", "isa_is_forced"}


def check_raised(error: BaseException) -> None:
    """Fail for an exception that is not ours, unless torch refused before it called us."""
    if isinstance(error, SqCpuError):
        assert "\n" not in str(error), f"more than one line: {error}"
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    torch_refused = frames[-1].filename.endswith("_ops.py") and not ours
    assert torch_refused, "".join(traceback.format_exception(error)[-6:])


@pytest.mark.parametrize("name", DOORS)
def test_a_hostile_call_is_refused_or_right(name: str) -> None:
    door, is_core = DOORS[name], name.startswith("_core.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(CASES if door.kinds else 1):
        rng = random.Random(f"{name} {seed}")
        torch.manual_seed(seed)
        base = good() | {key: make() for key, make in OTHERS.get(name, {}).items()}
        arguments = {parameter: base[parameter] for parameter in door.kinds}
        changed = rng.sample(list(arguments), min(len(arguments), rng.choice([1, 1, 2, 3])))
        try:
            with torch.set_grad_enabled(rng.random() < 0.5):
                for key in changed if seed else ():  # the first call is the good one
                    arguments[key] = extreme(door.kinds[key], base[key], rng, is_core=is_core)
                door.call(**arguments)
        except Exception as error:
            refused += 1
            try:
                assert seed > 0, "the good call"
                check_raised(error)
            except AssertionError as failure:
                raise AssertionError(f"seed {seed}, {changed}: {failure}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < MOST_NEW_BYTES
    assert refused or len(door.kinds) < 2, "no call was hostile"
