"""Every function through which Python reaches the kernels, with good arguments of each."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu import QuantLinear, Scheme
from sq_cpu.kernels import _core, attention, embedding, ops, paged_attention, runtime
from sq_cpu.kernels.ops import Epilogue, QuantizedActivation
from sq_cpu.kernels.paged_attention import AttentionOptions, BatchRows, KvPages
from sq_cpu.nn.packed_weight import PackedWeight

M, N, K = 3, 33, 65


@functools.cache
def layers() -> dict[str, QuantLinear]:
    torch.manual_seed(0)
    static = Scheme(activations="static")
    made = {
        "dynamic": QuantLinear.from_float(nn.Linear(K, N), Scheme()),
        "seven bits": QuantLinear.from_float(nn.Linear(K, N), Scheme(reduce_range=True)),
        "smoothed": QuantLinear.from_float(nn.Linear(K, N), Scheme(), smoothing=torch.ones(K)),
        "rotated": QuantLinear.from_float(nn.Linear(K, N), Scheme(), hadamard=64),
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
        "hadamard": 64,
        "dynamic_fallback": True,
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
        "inverse_smoothing": torch.rand(K) + 0.5,
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


# Three sequences: of two pages, of none, and of one.
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 20
NEW, LENGTHS, TABLES = [2, 0, 3], [66, 0, 3], [[3, 0], [], [2]]


def batch_rows() -> BatchRows:
    return BatchRows(NEW, LENGTHS, TABLES)


def keys() -> Tensor:
    return torch.randn(sum(NEW), KV_HEADS, HEAD_DIM)


def queries() -> Tensor:
    return torch.randn(sum(NEW), HEADS, HEAD_DIM)


def paged(**others: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Return the arguments of a function of the extension that works on pages, and others."""
    return {
        "pages": lambda: KvPages(4, KV_HEADS, HEAD_DIM)._pages,
        "head_dim": lambda: HEAD_DIM,
        "kind": lambda: _core.KvType.int8,
        "first_row": lambda: batch_rows().tensors[0],
        "length": lambda: batch_rows().tensors[1],
        "table": lambda: batch_rows().tensors[2],
    } | others


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
    "_core.sample": {
        "logits": lambda: torch.randn(2, N),
        "temperature": lambda: torch.tensor([0.7, 0.0]),
        "top_k": lambda: torch.tensor([3, 0]),
        "top_p": lambda: torch.tensor([0.9, 1.0]),
        "min_p": lambda: torch.zeros(2),
        "stream": lambda: torch.tensor([1, 2]),
        "position": lambda: torch.tensor([0, 5]),
        "edits": lambda: [None, (torch.tensor([1]), torch.ones(1), torch.ones(1))],
        "allowed": lambda: [torch.full((-(-N // 32),), -1, dtype=torch.int32), None],
        "ids": lambda: torch.zeros(2).long(),
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
    "_core.append": paged(k=keys, v=keys),
    "_core.attention": paged(
        q=queries,
        y=queries,
        scale=lambda: 0.5,
        causal=lambda: True,
        window=lambda: 3,
        softcap=lambda: 2.0,
        slopes=lambda: torch.rand(HEADS),
        sinks=lambda: torch.rand(HEADS),
    ),
    "_core.page_bytes": {"head_dim": lambda: HEAD_DIM, "kind": lambda: _core.KvType.bfloat16},
    "paged_attention.page_bytes": {"head_dim": lambda: HEAD_DIM, "kind": lambda: "bf16"},
    "BatchRows": {"new": lambda: NEW, "lengths": lambda: LENGTHS, "tables": lambda: TABLES},
    "KvPages": {
        "count": lambda: 4,
        "kv_heads": lambda: KV_HEADS,
        "head_dim": lambda: HEAD_DIM,
        "kind": lambda: "bf16",
    },
    "KvPages.append": {"rows": batch_rows, "k": keys, "v": keys},
    "KvPages.attend": {
        "rows": batch_rows,
        "q": queries,
        "options": lambda: AttentionOptions(
            scale=0.5, window=3, softcap=2.0, slopes=torch.rand(HEADS), sinks=torch.rand(HEADS)
        ),
    },
    "KvPages.read": {"table": lambda: TABLES[0], "length": lambda: 66},
    "KvPages.copy_page": {"source": lambda: 0, "target": lambda: 3},
    "KvPages.grow": {"count": lambda: 7},
    "torch.ops.linear": {
        "granularity": lambda: 2,
        "scale": lambda: 0.1,
        "zero_point": lambda: 128,
        "terms": lambda: 1,
        "hadamard": lambda: 0,
        "activation": lambda: 4,
        "other": lambda: torch.randn(M, N),
        "residual": lambda: torch.randn(M, N),
    },
    "torch.ops.gather_rows": {"type": lambda: 0},
    "torch.ops.batched_matmul": {"scale": lambda: 0.5, "type": lambda: 0},
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
    kinds = {"Optional[Tensor]": "Tensor | None"}
    found = {a.name: str(a.type) for a in operator._schema.arguments}
    return {name: kinds.get(kind, kind) for name, kind in found.items()}


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


def pages_method(name: str) -> Door:
    """Make the door of a method of KvPages, on pages of their own."""

    def call(**arguments: Any) -> Any:
        return getattr(KvPages(4, KV_HEADS, HEAD_DIM), name)(**arguments)

    return Door(call, annotations(getattr(KvPages, name)))


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
    for module in (ops, embedding, attention, paged_attention, runtime):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                label = f"{module.__name__.rpartition('.')[2]}.{name}"
                found[label] = Door(value, annotations(value))
    for name in ("linear", "gather_rows", "unpack_weight", "batched_matmul"):
        operator = getattr(torch.ops.sq_cpu, name).default
        found[f"torch.ops.{name}"] = Door(operator, schema(operator))
    found["QuantLinear"] = Door(QuantLinear, annotations(QuantLinear.__init__))
    found |= {f"QuantLinear.{name}": method(name) for name in METHODS}
    found |= {
        "BatchRows": Door(BatchRows, annotations(BatchRows.__init__)),
        "KvPages": Door(KvPages, annotations(KvPages.__init__)),
    }
    found |= {f"KvPages.{name}": pages_method(name) for name in PAGES_METHODS}
    found["PackedWeight"] = Door(packed_weight, annotations(packed_weight))
    whole = functools.partial(PackedWeight.zeros(N, K).pack)
    found["PackedWeight.pack"] = Door(whole, annotations(PackedWeight.pack))
    found["PackedWeight.zeros"] = Door(PackedWeight.zeros, annotations(PackedWeight.zeros))
    fields = {field.name: str(field.type) for field in dataclasses.fields(QuantizedActivation)}
    found["QuantizedActivation"] = Door(activation_of, fields)
    found["a replaced buffer"] = Door(with_buffer, {"buffer": "Tensor", "x": "Tensor"})
    return found


METHODS = ("forward", "forward_int8", "quantize_input", "count_saturation")
PAGES_METHODS = ("append", "attend", "read", "copy_page", "grow")
# Plain torch, and no kernel: a reference, torch.empty of any size that it is asked for, and whether
# a gradient is asked for.
PLAIN = {
    "attention.matmul_reference",
    "ops.empty",
    "ops.needs_gradient",
    "ops.refuse_gradient",
    "paged_attention.attend_reference",
}


def positional(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(*arguments.values())
