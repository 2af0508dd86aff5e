"""Extremes of a type: values, and tensors of other dtypes, shapes, layouts and places."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from hostile_calls import LENGTHS, NEW, TABLES, K, M, N, layers
from torch import Tensor, nn

from sq_cpu import Scheme
from sq_cpu.kernels import _core
from sq_cpu.kernels.ops import Activation, Epilogue, QuantizedActivation
from sq_cpu.kernels.paged_attention import BatchRows
from sq_cpu.nn.packed_weight import PackedWeight

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


def changed(value: Any, rng: random.Random) -> Any:
    """Return a frozen dataclass with one field changed, of those that its constructor takes."""
    field = rng.choice(dataclasses.fields(value))
    other = extreme(str(field.type), getattr(value, field.name), rng, is_core=False)
    return dataclasses.replace(value, **{field.name: other})


def batch_of(rows: BatchRows, rng: random.Random) -> BatchRows:
    """Return other rows, made as they should be or with a part replaced behind their back."""
    if rng.random() < 0.5:
        lists = [copy.deepcopy(part) for part in (NEW, LENGTHS, TABLES)]
        at = rng.randrange(3)
        lists[at] = extreme(
            "Sequence[Sequence[int]]" if at == 2 else "Sequence[int]", lists[at], rng, is_core=False
        )
        return BatchRows(*lists)
    forged = copy.copy(rows)
    parts = list(rows.tensors)
    at = rng.randrange(3)
    integers = parts[at].clone()
    if rng.random() < 0.5 and integers.numel():
        limits = torch.iinfo(integers.dtype)
        several = [each for each in INTEGERS if limits.min <= each <= limits.max]
        integers.flatten()[rng.randrange(integers.numel())] = rng.choice(several)
        parts[at] = integers
    else:
        parts[at] = tensors(integers, rng, is_core=False)
    forged.tensors = tuple(parts)
    return forged


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
    kinds = [kind.removesuffix(" | None")] if kind.startswith("list[") else kind.split(" | ")
    if kind.endswith(" | None") and rng.random() < 0.2:
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
        case "str" | "Activation" | "KvKind" if isinstance(value, str):
            names = ["", "static", "per_tensor", "__class__", "name", "a" * 10**5, "\0"]
            return rng.choice([*names, *get_args(Activation), "avx2", "reference"])
        case "DType" | "Activation" | "BatchedType" | "Granularity" | "KvType" as name:
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
        case "AttentionOptions":
            return changed(value, rng)
        case "BatchRows":
            return batch_of(value, rng)
        case "QuantizedActivation":
            return replaced(value, rng)
        case "Scheme":
            return rng.choice([Scheme(), Scheme(activations="static"), Scheme(symmetric=False)])
        case "QuantLinear":
            return layers()[rng.choice(list(layers()))]
        case _ if kinds[0] == "Iterable[Tensor]":
            return [extreme("Tensor", each, rng, is_core=False) for each in value]
        case _ if (
            kinds[0].startswith("list[") and value is not None
        ):  # of tensors, or tuples of them
            several = [
                each
                if each is None or rng.random() < 0.3
                else tuple(tensors(x, rng, is_core) for x in each)
                if isinstance(each, tuple)
                else tensors(each, rng, is_core)
                for each in value
            ]
            return several[1:] if rng.random() < 0.2 else several
        case _ if kinds[0] == "Sequence[Sequence[int]]":
            several = list(value)
            several[rng.randrange(len(several))] = [
                extreme("int", 1, rng, is_core=False)
            ] * rng.choice([1, 2, 3])
            return several[1:] if rng.random() < 0.3 else several
        case _ if kinds[0] == "Sequence[int]":
            several = list(value)
            several[rng.randrange(len(several))] = extreme("int", 1, rng, is_core=False)
            return several[1:] if rng.random() < 0.3 else several
        case _ if kinds[0] in ("tuple[int, ...]", "Sequence[float]"):
            element = "int" if "int" in kinds[0] else "float"
            several = [extreme(element, 1, rng, is_core=False)]
            return value[:-1] if rng.random() < 0.3 else several
    raise AssertionError(f"the annotation {kind} has no extremes: add a row")
