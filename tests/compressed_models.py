"""Models in the format compressed-tensors: written by hand, and by the package itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
STATIC = INT8 | {"strategy": "tensor"}
TOKEN = INT8 | {"strategy": "token", "dynamic": True}
INT4 = INT8 | {"num_bits": 4, "strategy": "group", "group_size": 4}


def settings(
    weights: Any = INT8, inputs: Any = STATIC, *, kind: str = "int-quantized", **entries: Any
) -> dict[str, Any]:
    """Return a quantization_config of one group of linears."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None, "format": kind}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    } | entries


class Net(nn.Module):
    """One linear, [4, 8], which transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def write_net(folder: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    """Write a `Net` whose linear has these tensors."""
    folder.mkdir(exist_ok=True)
    content = {"architectures": ["Net"], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    named = {f"linear.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return folder


def edit_settings(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config of a folder."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


FILE = "model.safetensors"


def compress(
    model: Any, ids: Tensor, weights: dict[str, Any], inputs: dict[str, Any] | None, folder: Path
) -> Any:
    """Quantize a model by the package compressed-tensors, save it, and return it dequantized.

    As llm-compressor does it: ranges of weights and inputs by min and max.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, args: tuple[Tensor]) -> None:
        low, high = args[0].aminmax()
        before = ranges.get(module, (low, high))
        ranges[module] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [linear.register_forward_pre_hook(watch) for linear in linears]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in linears:
        if not hasattr(module, "quantization_scheme"):
            continue
        args = module.quantization_scheme.weights
        scale, point = calculate_qparams(*_ranges(module.weight.detach(), args), args)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(point)
        if inputs is not None and not inputs["dynamic"]:
            args = module.quantization_scheme.input_activations
            scale, point = calculate_qparams(*ranges[module], args)
            module.input_scale.data.copy_(scale)
            module.input_zero_point.data.copy_(point)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return model


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    if args.strategy == "tensor":
        low, high = weight.aminmax()
        return low, high
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(2), groups.amax(2)
    return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
