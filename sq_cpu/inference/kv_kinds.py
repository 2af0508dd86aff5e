"""What a model's keys and values are cached in, layer by layer: int8, or bf16 where it must be.

The model's config keeps it, as the numbers of the layers in bf16, and goes with the checkpoint.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, get_args

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.paged_attention import KvKind

__all__ = ["KvChoice", "check_kv", "choose_kv", "kv_kind", "kv_kinds", "layer_count"]

KvChoice = KvKind | Mapping[int, KvKind] | Mapping[str, KvKind]
"""Of all layers, or by the layer's number ("1", as in JSON, is 1); others are int8."""

_IN_BF16 = "sq_cpu_bf16_kv_layers"


def choose_kv(config: Any, kv: KvChoice) -> None:
    """Have the layers of a model keep keys and values so; caches that it has stay as they are.

    Raises
    ------
    SqCpuError
        For a layer that the model has not, and for another kind.
    """
    in_bf16 = layers_in_bf16(config, kv)
    keeper = _keeper(config)
    if in_bf16:
        setattr(keeper, _IN_BF16, in_bf16)
    elif hasattr(keeper, _IN_BF16):
        delattr(keeper, _IN_BF16)


def layers_in_bf16(config: Any, kv: KvChoice) -> list[int]:
    """Return the layers that `choose_kv` would have in bf16, and raise what it would."""
    layers = range(layer_count(config))
    given: Mapping[Any, KvKind] = kv if isinstance(kv, Mapping) else dict.fromkeys(layers, kv)
    by_layer: dict[int, KvKind] = {}
    for name, kind in given.items():
        layer = _number(name)
        if layer is None or layer not in layers:
            raise SqCpuError(f"kv names layer {name!r}; the model has 0 .. {len(layers) - 1}")
        if kind not in get_args(KvKind):
            raise SqCpuError(f"kv is {kind!r}; it is {' or '.join(get_args(KvKind))}")
        if by_layer.setdefault(layer, kind) != kind:
            raise SqCpuError(f"kv names layer {layer} twice, with different kinds: name it once")
    return sorted(layer for layer, kind in by_layer.items() if kind == "bf16")


def layer_count(config: Any) -> int:
    """Return how many layers a model's decoder has; `SqCpuError` where its config does not say."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise SqCpuError(
            f"{type(text).__name__} has no num_hidden_layers: kv, an int8 cache and a prefix are "
            "for a decoder whose config says how many layers it has; leave them out"
        )
    return count


def _number(name: Any) -> int | None:
    """Return the number of a layer, an integer of any type or its decimal digits; else None."""
    if isinstance(name, str):
        return int(name) if name.isdecimal() and len(name) < 10 else None
    try:
        return None if isinstance(name, bool) else operator.index(name)
    except TypeError:
        return None


def check_kv(model: Any, enabled: bool, kv: KvChoice | None) -> None:
    """Raise `SqCpuError` for a `kv` that a model of transformers cannot be switched to."""
    if kv is None:
        return
    if not enabled:
        raise SqCpuError("kv is given with enabled=False, which changes no cache: leave it out")
    layers_in_bf16(model.config, kv)


def kv_kind(config: Any, layer: int | None) -> KvKind:
    """Return what a layer's keys and values are cached in; None: of no layer, int8."""
    given = getattr(_keeper(config), _IN_BF16, ())
    if not isinstance(given, list | tuple) or not all(type(each) is int for each in given):
        raise SqCpuError(f"the model's config has {_IN_BF16} {given!r}: it is a list of layers")
    return "bf16" if layer in given else "int8"


def kv_kinds(config: Any, layers: int) -> list[KvKind]:
    """Return it of so many layers."""
    return [kv_kind(config, layer) for layer in range(layers)]


def _keeper(config: Any) -> Any:
    """Return the config that keeps it: the text's, or the model's where the text has none.

    Of an encoder-decoder without sub-configs (BART) transformers makes a text config at every call.
    """
    if config.is_encoder_decoder and not config.sub_configs:
        return config
    text = config.get_text_config(decoder=True)
    return config if type(text) is type(config) else text
