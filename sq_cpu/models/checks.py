"""What no verb can work with: refused by each of them first, before it runs or changes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.models.hooks import hooked
from sq_cpu.nn.linear import QuantLinear

__all__ = [
    "additions",
    "check_ids",
    "check_is_module",
    "check_model",
    "check_weights",
    "checking_ids",
    "input_embeddings",
]

_OPTIMIZED = "OptimizedModule"


def check_is_module(model: object) -> None:
    """Raise `SqCpuError` for what is no model, as its name or folder."""
    if not isinstance(model, nn.Module):
        raise SqCpuError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module: load it first, as with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )


def check_model(model: Any) -> None:
    """Raise `SqCpuError` unless a model can be watched while it runs, here, in float."""
    check_is_module(model)
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, QuantLinear):
            raise SqCpuError("the model is quantized already; start from its float weights")
        if _is_compiled(module):
            raise SqCpuError(
                f"{what} is compiled, and nothing sees what runs in it: give the model as it was, "
                "and compile what quantize returns"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "?")
        raise SqCpuError(
            f"the model is quantized already (quant_method {getattr(method, 'value', method)!r}); "
            "load its float weights"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SqCpuError(f"{name} has no shape yet: call the model once")
        if parameter.is_meta:
            raise SqCpuError(
                f"{name} is on the meta device (not loaded, or offloaded by a device_map): load "
                'the whole model into memory, as with device_map="cpu"'
            )
        if not parameter.is_cpu:
            raise SqCpuError(f'{name} is on {parameter.device}; sq_cpu needs model.to("cpu")')


def _is_compiled(module: nn.Module) -> bool:
    # By its name: importing torch._dynamo takes seconds.
    is_other = isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == _OPTIMIZED
    return is_other or module._compiled_call_impl is not None


def check_weights(linears: Mapping[str, nn.Linear]) -> None:
    """Raise `SqCpuError` for linears whose weights are no plain tensors of a dtype that runs."""
    for name, linear in linears.items():
        for key, parameter in linear.named_parameters():
            kind = type(parameter)
            if kind not in (nn.Parameter, Tensor) or parameter.layout is not torch.strided:
                raise SqCpuError(
                    f"{name}.{key} is a {kind.__module__}.{kind.__name__} ({parameter.layout}), no "
                    "plain tensor: load the model without what made it one, or ignore this linear"
                )
            if parameter.dtype not in FLOATS:
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise SqCpuError(
                    f"{name}.{key} is {dtype}; sq_cpu runs fp32, bf16 and fp16: model.float(), or "
                    "ignore this linear"
                )


def additions(module: nn.Module) -> str:
    """Return what was put onto a linear, which int8 would lose, and how to undo it; "" if nothing.

    What is by design in the model's code (a subclass, a weight that other code reads) is kept in
    float instead.
    """
    if is_parametrized(module):
        return "is parametrized, which int8 would lose: remove_parametrizations"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which int8 would lose: remove them"
    if "forward" in vars(module):
        return (
            "has a forward of its own (an adapter's, or accelerate's), which int8 would lose: "
            "remove it, as accelerate.hooks.remove_hook_from_module does"
        )
    return ""


@contextmanager
def checking_ids(model: nn.Module) -> Iterator[None]:
    """Run a block in which an id that an embedding has no row for is an `SqCpuError`."""
    words = input_embeddings(model)

    def check(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            check_ids(module, name, next(iter((*args, *kwargs.values())), None))

        return hook

    tables: list[tuple[nn.Module, Any]] = [
        (module, check(name))
        for name, module in model.named_modules()
        # Another subclass may look up something else than what it is called with.
        if type(module) is nn.Embedding or (module is words and isinstance(module, nn.Embedding))
    ]
    with hooked(before=tables):
        yield


def check_ids(table: Any, name: str, ids: Any) -> None:
    """Raise `SqCpuError` for ids that an embedding has no row for; it is named so."""
    if not isinstance(table, nn.Embedding) or not isinstance(ids, Tensor) or not ids.numel():
        return
    least, greatest = (int(end) for end in ids.aminmax())
    if least < 0 or greatest >= table.num_embeddings:
        raise SqCpuError(
            f"id {least if least < 0 else greatest} is none of the {table.num_embeddings} rows of "
            f"{name}: tokenize with the model's own tokenizer"
        )


def input_embeddings(model: Any) -> nn.Module | None:
    """Return what embeds the tokens of a model of transformers; None where that is not known."""
    try:
        table: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table
