"""A quantized model in the compressed-tensors format, for vLLM and others: its integers, renamed.

The format holds linears of transformers' own models, each with int8 rows that have a scale each,
and inputs quantized per token or by a static scale. What it cannot say is refused by name. What
differs where the model then runs: per-token symmetric inputs span 127 steps here and in vLLM, and
127.5 in compressed-tensors' own code; static symmetric codes end at -127 here, at -128 there.

The entry ``sq_cpu_export`` of config.json names the files that were written, so that they can be
replaced by what is saved later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.checkpoint.compressed_config import COMPRESSED_TENSORS
from sq_cpu.checkpoint.entries import int8_layers, own_entries
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = [
    "check_compressible",
    "check_expressible",
    "check_recipe",
    "compressed_entries",
    "compressed_settings",
    "compressed_tensors",
]

VERSION = "0.20.0"
"""Of compressed-tensors, whose layout this is; 0.17, which vLLM pins, reads it."""
_POINT = 128  # of codes in int8, which are stored as u8
_SHARDS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one parent that vLLM joins into one layer."""
_CANNOT = "the format compressed-tensors has no place for"
_HEAD = 'quantize with head="float" (--head float)'
_DECOMPOSED = "channels in float beside int8 ones; plan no outliers"
_ROTATED = "inputs that are rotated at run time; quantize with hadamard=0 (--no-hadamard)"
_SMOOTHED = (
    "inputs that are smoothed at run time, where s is not folded into the layer before; leave that "
    "group out of the plan, or quantize with smooth=False (--no-smooth)"
)
# What a scheme may not say: whether it does, what that is, and what to do.
_NO_PLACE: tuple[tuple[Callable[[Scheme], bool], str, str], ...] = (
    (
        lambda scheme: scheme.activations == "per_tensor",
        "activations with one scale a call, found at run time",
        'quantize with scheme="O1" or "O3"',
    ),
    (
        lambda scheme: scheme.activations == "per_token_x2",
        "activations in two int8 terms",
        _HEAD,
    ),
    (
        lambda scheme: scheme.outlier_threshold is not None,
        "channels in float beside int8 ones",
        "quantize without outlier_threshold",
    ),
    (
        lambda scheme: scheme.reduce_range is True,
        "7-bit activations",
        "quantize with reduce_range=False",
    ),
    (
        lambda scheme: scheme.activations == "static" and scheme.dynamic_fallback,
        "rows that get a scale of their own where the static one does not fit, which the static "
        "ranges count on",
        "quantize with dynamic_fallback=False (--no-dynamic-fallback)",
    ),
)


def check_expressible(scheme: Scheme, of: str = "the scheme") -> None:
    """Raise `SqCpuError` for a scheme that the format cannot say; `of` is whose it is."""
    for is_so, what, fix in _NO_PLACE:
        if is_so(scheme):
            raise SqCpuError(f"{of}: {_CANNOT} {what}; {fix}")


def check_recipe(recipe: Recipe) -> None:
    """Raise `SqCpuError` for a recipe whose model the format could not hold, whatever the model."""
    if recipe.head == "int8":
        raise SqCpuError(f"{_CANNOT} an int8 head; {_HEAD}")
    if recipe.hadamard == BLOCK:
        raise SqCpuError(f"{_CANNOT} {_ROTATED}")
    check_expressible(recipe.scheme)
    plan = recipe.plan or SmoothPlan(())
    for layer in plan.layers:
        if layer.outliers:
            raise SqCpuError(f"{layer.name}: {_CANNOT} {_DECOMPOSED}")
        if layer.smoothing:
            raise SqCpuError(f"{layer.name} of the plan: {_CANNOT} {_SMOOTHED}")
        if not layer.in_float:
            check_expressible(plan.layer_scheme(recipe.scheme, layer.name), layer.name)
    for group in plan.groups:
        if group.hadamard:
            raise SqCpuError(f"group {group.name} of the plan: {_CANNOT} {_ROTATED}")
        if not group.fold:
            raise SqCpuError(f"group {group.name} of the plan: {_CANNOT} {_SMOOTHED}")


def check_compressible(
    model: nn.Module, record: QuantizationRecord, stock: Mapping[str, nn.Module]
) -> None:
    """Raise `SqCpuError` for a quantized model that the format cannot hold.

    Parameters
    ----------
    stock : the modules, by full name, of the model that transformers builds from its config
    """
    if record.prefix:
        raise SqCpuError(
            f"{_CANNOT} a prefix whose keys and values stay in float; calibrate without one "
            "(--prefix off)"
        )
    layers = dict(int8_layers(model))
    for name, layer in layers.items():
        check_expressible(layer.scheme, name)
    for names, what in (
        (record.decomposed, _DECOMPOSED),
        (record.embeddings, "an embedding that reads an int8 head; " + _HEAD),
        (record.hadamard, _ROTATED),
        (record.smoothed, _SMOOTHED),
    ):
        if names:
            raise SqCpuError(f"{min(names)}: {_CANNOT} {what}")
    for name in layers:
        if not isinstance(stock.get(name), nn.Linear):
            raise SqCpuError(
                f"{name} is no linear of its own in transformers' {type(model).__name__}, and the "
                f"format compressed-tensors holds such alone; ignore it when you quantize"
            )
    _check_shards(layers, stock)


def _check_shards(layers: Mapping[str, QuantLinear], stock: Mapping[str, nn.Module]) -> None:
    """Raise `SqCpuError` where linears that vLLM joins quantize their input differently."""
    for parent in stock:
        for shards in _SHARDS:
            names = [f"{parent}.{shard}" for shard in shards]
            if not all(isinstance(stock.get(name), nn.Linear) for name in names):
                continue
            first, *others = names
            for name in others:
                one, other = (_inputs(layers.get(each)) for each in (first, name))
                if one != other:
                    raise SqCpuError(
                        f"{first} has {one}, {name} {other}, but vLLM joins both into one layer; "
                        "plan them alike"
                    )


def _inputs(layer: QuantLinear | None) -> str:
    if layer is None:
        return "inputs in float"
    kind = "symmetric" if _is_symmetric(layer) else "asymmetric"
    static = "" if layer.input_scale is None else f" of scale {layer.input_scale!r}"
    point = "" if _is_symmetric(layer) else f" and point {layer.input_zero_point}"
    return f"{layer.scheme.activations} {kind} inputs{static}{point if static else ''}"


def _is_symmetric(layer: QuantLinear) -> bool:
    """Say whether a layer's grid is symmetric there: also a static one around code 128."""
    return layer.scheme.symmetric or (layer.static is not None and layer.static[1] == _POINT)


def compressed_entries(layer: QuantLinear, name: str) -> dict[str, Tensor]:
    """Give name -> meta tensor of what `compressed_tensors` gives."""
    rows = layer.out_features
    entries = {
        "weight": torch.empty((rows, layer.in_features), dtype=torch.int8, device="meta"),
        "weight_scale": torch.empty((rows, 1), dtype=torch.float32, device="meta"),
    }
    if layer.has_bias:
        entries["bias"] = torch.empty(rows, dtype=layer.dtype, device="meta")
    if layer.input_scale is not None:
        entries["input_scale"] = torch.empty(1, dtype=torch.float32, device="meta")
        if not _is_symmetric(layer):
            entries["input_zero_point"] = torch.empty(1, dtype=torch.int8, device="meta")
    return {f"{name}.{key}": tensor for key, tensor in entries.items()}


def compressed_tensors(layer: QuantLinear, name: str) -> dict[str, Tensor]:
    """Give the tensors of a linear: scales in fp32, the bias in what the linear computes in."""
    own = own_entries(layer, name)
    tensors: dict[str, Tensor] = {}
    for key, entry in compressed_entries(layer, name).items():
        value = own[key]
        if key == f"{name}.input_zero_point":
            value = value - _POINT
        tensors[key] = value.to(entry.dtype).reshape(entry.shape)
    return tensors


def compressed_settings(model: nn.Module, linears: Collection[str]) -> dict[str, Any]:
    """Return the quantization_config; `linears` are those of the stock model, by full name."""
    kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
    layers = dict(int8_layers(model))
    for name, layer in layers.items():
        static = layer.scheme.activations == "static"
        inputs = _args("tensor" if static else "token", _is_symmetric(layer), dynamic=not static)
        kinds.setdefault(str(inputs), (inputs, []))[1].append(name)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": _args("channel", True, dynamic=False),
            "input_activations": inputs,
            "output_activations": None,
            "format": "int-quantized",
        }
        for index, (inputs, names) in enumerate(kinds.values())
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "version": VERSION,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in layers],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _args(strategy: str, symmetric: bool, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
    }
