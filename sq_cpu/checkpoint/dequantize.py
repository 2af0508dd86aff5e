"""An int8 model of transformers becomes a float one again: `model.dequantize()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sq_cpu.checkpoint.config import check_dtype
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import use_prefix
from sq_cpu.models.hf_private import bare_model, from_config, set_ties, tied_weights
from sq_cpu.models.linears import as_linears
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.replace import replace_linears, unmark_quantized

__all__ = ["dequantize"]


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put float linears in the place of int8 ones, in place, and return the model.

    Their weights are codes x scale, with smoothing and rotation undone where they were not folded
    into other layers: what the codes stand for, in the model's own modules (Conv1D, 3-D experts).
    A head that is tied to a float embedding gets its weight. Extra memory is that of one linear, or
    of one mixture's experts. A prefix is dropped.

    Parameters
    ----------
    model : transformers.PreTrainedModel, quantized, not fused
    dtype : torch.dtype, optional
        Of all parameters; None, or the model's own: as they are.

    Raises
    ------
    SqCpuError
        For a fused model, and another dtype than fp32, bf16 and fp16.
    """
    check_dtype(dtype)
    record = model.sq_cpu_config
    for name in record.layers:
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear | DecomposedLinear):
            raise SqCpuError(
                f"{name} is a {type(layer).__name__}, no int8 linear: unload the adapters first"
            )
    use_prefix(model, None)
    given = None if dtype == model.dtype else dtype
    float_model: Any = bare_model(lambda: from_config(type(model), model.config, model.dtype))
    for name in record.layers:
        replace_linears(model, {name: _linear(model.get_submodule(name))})
    for name, head in record.embeddings.items():
        embedding: Any = float_model.get_submodule(name).eval()
        embedding.weight = model.get_submodule(head).weight
        if isinstance(scale := model.get_submodule(name).embed_scale, torch.Tensor):
            embedding.embed_scale = scale
        replace_linears(model, {name: embedding})
    for name, module in list(float_model.named_modules()):
        _fill(module, name, model)
    ties = tied_weights(float_model)
    set_ties(model, ties)
    if ties:
        model.tie_weights()
    unmark_quantized(model)
    model.requires_grad_(True)
    return model if given is None else model.to(given)


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, QuantLinear | DecomposedLinear)
    inner = layer.regular if isinstance(layer, DecomposedLinear) else layer
    weight = inner.weight_float()
    if isinstance(layer, DecomposedLinear):
        weight[:, layer.columns] = layer.outlier_weight.float()
    linear = nn.Linear(inner.in_features, inner.out_features, inner.has_bias, device="meta")
    linear.weight = nn.Parameter(weight.to(inner.dtype))
    if inner.bias is not None:
        linear.bias = nn.Parameter(inner.bias.to(inner.dtype))
    return linear.eval()


@torch.no_grad()
def _fill(module: nn.Module, name: str, model: nn.Module) -> None:
    """Put a module that hides linears, on the meta device yet, in the place of those in `model`."""
    if as_linears(module) is None:
        return
    own = model.get_submodule(name)
    module.to_empty(device="cpu")
    module.to(next(own.parameters()).dtype)
    views: Any = as_linears(module)
    for path, view in views.named_modules():
        if isinstance(view, nn.Linear):
            linear: Any = own.get_submodule(path)
            view.weight.copy_(linear.weight)
            if view.bias is not None:
                view.bias.copy_(linear.bias)
    replace_linears(model, {name: module.eval()})
