"""transformers' private names: everything that is used from inside of it, and only here.

They were written for one major version, and another may give them other meanings: with it, each
function raises `SqCpuError`, which says what to install.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError

__all__ = [
    "ATTENTION_MODULE",
    "LOADING_NOTES",
    "CheckpointLayout",
    "ExpertsLayout",
    "attending_by",
    "attention_implementation",
    "bare_model",
    "check_version",
    "compute_buffers",
    "experts_activation",
    "experts_layout",
    "forget_quantization",
    "from_config",
    "hub_kernels",
    "is_transformers",
    "load_again",
    "load_nothing",
    "sampling_loop",
    "set_ties",
    "tied_weights",
]

_MAJOR = 5
ATTENTION_MODULE = "transformers.modeling_utils"
"""Where attention functions are registered."""
LOADING_NOTES = frozenset({"all_tied_weights_keys", "hf_device_map", "is_quantized"})
"""Attributes of a model that say how it was loaded."""
_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers reads it at each load


def check_version() -> None:
    """Raise `SqCpuError` for another major version of transformers."""
    import transformers

    if transformers.__version__.partition(".")[0] != str(_MAJOR):
        raise SqCpuError(
            f"transformers {transformers.__version__} is not a version {_MAJOR}, whose models "
            f"sq_cpu can build and fill; pip install 'transformers>={_MAJOR},<{_MAJOR + 1}'"
        )


def is_transformers(model: nn.Module) -> bool:
    """Say whether a model is one of transformers, or of a class derived from its."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def attention_implementation(config: Any) -> str | None:
    """Return the name of the attention that a config's models compute with."""
    check_version()
    name: str | None = config._attn_implementation
    return name


# --- models without weights -----------------------------------------------------------------------


def bare_model(make: Callable[[], Any]) -> Any:
    """Return make(), with all of its tensors on the meta device."""
    check_version()
    from transformers import initialization

    on_cpu = initialization.meta_device_safe_creation_ops()
    with initialization.no_init_weights(), torch.device("meta"), on_cpu:
        return make()


def compute_buffers(model: Any) -> None:
    """Compute the buffers of a bare model that checkpoints do not store, in memory.

    In the dtypes that from_pretrained gives them, which are not always the model's.
    """
    check_version()
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    _mark_initialized(model)
    model.initialize_weights()


def from_config(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of this class, as `config` says and in `dtype`."""
    check_version()
    model = model_class._from_config(config, dtype=dtype)
    model.config.dtype = dtype  # earlier releases leave that as it was
    return model


def hub_kernels(config: Any) -> list[str]:
    """Return the attention kernels that a config asks for from the hub: compiled code."""
    check_version()
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    names = [getattr(part, "_attn_implementation", None) for part in parts]
    return [name for name in names if isinstance(name, str) and "/" in name]


def load_nothing(
    model: Any, new: Collection[str] = (), unexpected: Collection[str] = ()
) -> tuple[Any, Any]:
    """Leave from_pretrained no weight to load into `model` and none to tie.

    It loads what the state dict names and initialises what is not marked: the `new` ones, which it
    reports as missing. It reports the `unexpected` tensors of its files, and no other. Buffers it
    makes as ever. Returns what `load_again` needs.
    """
    check_version()
    before = model._keys_to_ignore_on_load_unexpected, model.all_tied_weights_keys
    missing = {name: tensor for name, tensor in model.state_dict().items() if name in new}
    model.state_dict = lambda *_, **__: dict(missing)
    names = "|".join(map(re.escape, sorted(unexpected)))
    every_other = f"^(?!({names})$)" if names else ""
    model._keys_to_ignore_on_load_unexpected = {every_other}
    model.all_tied_weights_keys = {}
    _mark_initialized(model, new)
    return before


def load_again(model: Any, before: tuple[Any, Any]) -> None:
    """Undo `load_nothing`, which returned `before`."""
    check_version()
    del model.state_dict
    model._keys_to_ignore_on_load_unexpected, model.all_tied_weights_keys = before


def _mark_initialized(model: Any, but: Collection[str] = ()) -> None:
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = name not in but


def forget_quantization(model: Any) -> None:
    """Make a model that transformers dequantized an ordinary float model, to be saved and cast."""
    check_version()
    if getattr(model, "hf_quantizer", None) is not None:  # earlier releases leave none
        model.hf_quantizer.remove_quantization_config(model)


# --- experts of a mixture -------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of transformers keeps the weights of its experts, each a slice of one 3-D one.

    They are `up_name` and "down_proj"; the biases, if any, have the same names with "_bias".
    """

    up_name: str
    """"gate_up_proj", or "up_proj" where there is no gate."""
    transposed: bool
    """Whether a slice is [in_features, out_features]."""


def experts_layout(module: Any) -> ExpertsLayout | None:
    """Return the layout of what `use_experts_implementation` made, or None for another module.

    A norm after each expert is not in the layout: None.
    """
    names = ("is_transposed", "_apply_gate", "down_proj")
    if not all(hasattr(module, name) for name in names):
        return None
    if not isinstance(module.down_proj, nn.Parameter) or module.down_proj.dim() != 3:
        return None
    check_version()
    if getattr(module, "has_post_expert_norm", False):
        return None
    return ExpertsLayout("gate_up_proj" if module.has_gate else "up_proj", module.is_transposed)


def experts_activation(module: Any, x: Tensor) -> Tensor:
    """Return what the experts of a module with an `experts_layout` do between up and down."""
    result: Tensor = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return result


# --- tied weights -------------------------------------------------------------------------------


def tied_weights(model: Any) -> dict[str, str]:
    """Return which parameter, by full name, is tied to which."""
    check_version()
    return dict(model.all_tied_weights_keys)


def set_ties(model: Any, ties: Mapping[str, str]) -> None:
    """Say which parameter, by full name, is tied to which."""
    check_version()
    model.all_tied_weights_keys = dict(ties)


# --- stored tensors -----------------------------------------------------------------------------


class CheckpointLayout:
    """How from_pretrained names, casts and lays out stored tensors for a model."""

    def __init__(self, model: Any) -> None:
        check_version()
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._entries: Mapping[str, Any] = model.state_dict()
        self._conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        self._dtypes: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)

    @property
    def mixes_dtypes(self) -> bool:
        """Whether some entries have a dtype that is not the model's."""
        return bool(self._dtypes)

    def name_of(self, key: str) -> tuple[str, bool]:
        """Return the name that a stored tensor has in the model, and whether it is laid out anew.

        The model has no entry of that name where from_pretrained ignores the tensor.
        """
        from transformers.core_model_loading import rename_source_key

        prefix, entries = self._model.base_model_prefix, self._entries
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, entries)
        if name not in entries and key in entries:
            name, pattern = rename_source_key(key, [], [], prefix, entries)
        return name, pattern is not None

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that an entry of the model gets."""
        from transformers.core_model_loading import build_glob_alternation

        if self._dtypes:
            pattern, groups, _ = build_glob_alternation(list(self._dtypes))
            if match := pattern.search(name):
                return self._dtypes[groups[match.lastgroup]]
        dtype: torch.dtype = self._entries[name].dtype
        return dtype

    def load(self, tensors: Mapping[str, Any]) -> Any:
        """Load tensors by their stored names; each is read by `tensor[...]` when it is needed.

        Returns `mismatched_keys`, (name, found shape, expected shape), and `conversion_errors`, by
        name.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            dtype=self._model.dtype, dtype_plan=self._dtypes, weight_mapping=self._conversions
        )
        load = convert_and_load_state_dict_in_model
        # 5.9 wants it, later releases have none.
        more = {"tp_plan": None} if "tp_plan" in signature(load).parameters else {}
        with _quietly_on_this_thread():
            info, _ = load(self._model, dict(tensors), config, **more)
        return info


@contextmanager
def _quietly_on_this_thread() -> Iterator[None]:
    """Have transformers load without a progress bar and without threads of its own.

    Four new threads a call would each leave pieces in a heap of its own.
    """
    from transformers.utils import logging

    with ExitStack() as undo:
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        threaded = os.environ.get(_ONE_THREAD)
        if threaded is None:
            undo.callback(os.environ.pop, _ONE_THREAD)
        else:
            undo.callback(os.environ.__setitem__, _ONE_THREAD, threaded)
        logging.disable_progress_bar()
        os.environ[_ONE_THREAD] = "1"
        yield


# --- attention ------------------------------------------------------------------------------------

_SEEN = "sq_cpu_seen"


@contextmanager
def attending_by(model: Any, attention: Callable[..., tuple[Tensor, Any]]) -> Iterator[None]:
    """Have a model attend by `attention`, whose arguments are those of transformers' "eager".

    Raises `SqCpuError` for a model whose attention is not exchanged through their interface.
    """
    check_version()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_SEEN, attention)
    AttentionMaskInterface.register(_SEEN, eager_mask)
    before = attention_implementation(model.config)
    try:
        model.set_attn_implementation(_SEEN)
    except (ValueError, KeyError) as error:
        raise SqCpuError(f"its attention cannot be exchanged: {error}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sampling_loop(model: Any) -> Callable[..., Any]:
    """Return the loop in which `generate` makes one token after another, greedily or sampled."""
    check_version()
    loop: Callable[..., Any] = model._sample
    return loop
