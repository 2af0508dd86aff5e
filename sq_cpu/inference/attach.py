"""Int8 attention and int8 caches for a model, with its calls as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.attention import ATTENTION
from sq_cpu.inference.cache import replace_layers
from sq_cpu.inference.kv_kinds import KvChoice, check_kv, choose_kv
from sq_cpu.models.hf_private import attention_implementation, is_transformers
from sq_cpu.models.hooks import before_every_call

__all__ = ["attend_in_floats", "attention_restored", "use_int8_attention"]

_CACHE = "past_key_values"
_POSITIONAL = 3
"""Ids, mask, positions: a call with more positional arguments may have named its cache so."""


def use_int8_attention(model: nn.Module, enabled: bool = True, kv: KvChoice | None = None) -> None:
    """Have a model of transformers compute attention in int8, over int8 keys and values.

    Its calls and its `generate` stay as they are. A call without a cache, where the model would
    make one, gets an `Int8Cache`; an empty `DynamicCache` gets int8 layers. Other caches stay what
    they are, and attention over them is computed in floats, as under enabled gradients.

    Parameters
    ----------
    model : a model of transformers with attention functions to choose from
    enabled : False undoes it
    kv : what keys and values are kept in: "int8", "bf16" with attention in floats, or by the number
        of the layer, {11: "bf16"}. The model's config keeps it, and so does a checkpoint; None: as
        it says, else int8. `sq_cpu.measure_kv` tells which layers need bf16

    Raises
    ------
    SqCpuError
        For another model, one that computes attention in code of its own, a layer that it has
        not, and `kv` with enabled=False; the model is as it was.
    """
    _check_is_of_transformers(model)
    check_kv(model, enabled, kv)
    given: Any = model
    ours = _key_of_hook(model)
    if not enabled:
        if ours is not None:
            given.set_attn_implementation(given._forward_pre_hooks.pop(ours).before)
            given._forward_pre_hooks_with_kwargs.pop(ours)
        return
    before = attention_implementation(given.config)
    given.set_attn_implementation(ATTENTION)
    if attention_implementation(given.config) != ATTENTION:
        raise SqCpuError(
            f"{type(model).__name__} computes attention in code of its own: it takes no "
            "attn_implementation"
        )
    if kv is not None:
        choose_kv(given.config, kv)
    if ours is None:
        before_every_call(model, _Int8Caches(before))


@contextmanager
def attention_restored(model: nn.Module) -> Iterator[None]:
    """Run a block, and have the model attend as before it, with the caches that it made."""
    _check_is_of_transformers(model)
    given: Any = model
    before, had_hook = attention_implementation(given.config), _key_of_hook(model) is not None
    try:
        yield
    finally:
        if not had_hook:
            use_int8_attention(model, enabled=False)
        if attention_implementation(given.config) != before:
            given.set_attn_implementation(before)


def attend_in_floats(model: nn.Module) -> None:
    """Have a model attend as before `use_int8_attention`; eager, where that was in int8 too."""
    given: Any = model
    ours = _key_of_hook(model)
    hook = None if ours is None else given._forward_pre_hooks[ours]
    before = attention_implementation(given.config) if hook is None else hook.before
    given.set_attn_implementation("eager" if before == ATTENTION else before)


def _check_is_of_transformers(model: nn.Module) -> None:
    if not is_transformers(model):
        raise SqCpuError(f"{type(model).__name__} is no model of transformers")


def _key_of_hook(model: nn.Module) -> int | None:
    hooks = model._forward_pre_hooks.items()
    return next((key for key, hook in hooks if isinstance(hook, _Int8Caches)), None)


class _Int8Caches:
    """Sees to it that a call's cache, where it is empty, is an int8 one."""

    def __init__(self, before: str | None) -> None:
        self.before = before
        """The attention that the model had."""

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        config = model.config
        if torch.is_grad_enabled() or attention_implementation(config) != ATTENTION:
            return None
        cache = kwargs.get(_CACHE)
        if type(cache) is DynamicCache:
            replace_layers(cache, config)
        elif cache is None and len(args) <= _POSITIONAL and not config.is_encoder_decoder:
            asked = kwargs.get("use_cache")
            made = DynamicCache(config=config)
            default = getattr(config.get_text_config(decoder=True), "use_cache", False)
            wanted = default if asked is None else asked
            if wanted and replace_layers(made, config):
                return args, kwargs | {_CACHE: made}
        return None
